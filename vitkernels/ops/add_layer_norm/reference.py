"""The specification of add_layer_norm and layer_norm_add: plain PyTorch, obvious, correct in
float64.

Corner cases that every backend follows: a sample with row_scale 0 ignores its branch, whatever it
holds (NaN and Inf too); dropout multiplies, so a dropped NaN stays NaN; statistics come from the
sum as it is stored, so that forward and backward see the same numbers.
"""

from __future__ import annotations

import math

import torch

from .._random import keep_mask

Tensor = torch.Tensor


def add_layer_norm(x, residual, weight, bias, eps, gamma, row_scale, seed, dropout_p, out_dtype):
    """z = residual + row_scale * gamma * dropout(x); y = LayerNorm(z). Returns y, z, mean, rstd."""
    z = x
    if residual is not None:
        z = widen(residual) + branch(widen(x), gamma, row_scale, seed, dropout_p)
        z = z.to(residual.dtype)
    xhat, mean, rstd = normalize(widen(z), eps)
    return affine(xhat, weight, bias).to(out_dtype), z, mean, rstd


def layer_norm_add(x, residual, weight, bias, eps, row_scale):
    """out = residual + row_scale * LayerNorm(x). Returns out, mean, rstd."""
    xhat, mean, rstd = normalize(widen(x), eps)
    out = widen(residual) + branch(affine(xhat, weight, bias), None, row_scale, None, 0.0)
    return out.to(residual.dtype), mean, rstd


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def branch(x, gamma, row_scale, seed, dropout_p):
    """row_scale[b] * gamma * dropout(x), with b the first dimension."""
    if row_scale is not None:
        scale = row_scale.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        x = torch.where(scale == 0, 0.0, x)
    if dropout_p > 0.0:
        x = x * (keep_mask(seed, tuple(x.shape), dropout_p).to(x.dtype) / (1.0 - dropout_p))
    if gamma is not None:
        x = x * gamma
    return x if row_scale is None else x * scale


def normalize(z, eps):
    mean = z.mean(-1, keepdim=True)
    rstd = (z - mean).square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (z - mean) * rstd, mean.squeeze(-1), rstd.squeeze(-1)


def affine(xhat, weight, bias):
    y = xhat if weight is None else xhat * weight
    return y if bias is None else y + bias


# --- raw operators --------------------------------------------------------------------------------


def add_layer_norm_fwd(
    x, residual, weight, bias, gamma, row_scale, seed, dropout_p, eps, out_dtype
):
    y, z, mean, rstd = add_layer_norm(
        x, residual, weight, bias, eps, gamma, row_scale, seed, dropout_p, out_dtype
    )
    new_residual = None if residual is None else z.contiguous()
    return y.contiguous(), new_residual, mean, rstd


def add_layer_norm_bwd(
    dy,
    dnew_residual,
    z,
    mean,
    rstd,
    x,
    weight,
    bias,
    gamma,
    row_scale,
    seed,
    dropout_p,
    x_dtype,
    output_mask,
):
    # weight.grad and friends of y = affine((z - mean) * rstd), written out: z is all that was
    # saved.
    wide = widen(z)
    C = z.shape[-1]
    xhat = (wide - mean.to(wide.dtype).unsqueeze(-1)) * rstd.to(wide.dtype).unsqueeze(-1)
    g = torch.zeros_like(wide) if dnew_residual is None else dnew_residual.to(wide.dtype)
    dweight = dbias = torch.zeros(C, device=z.device, dtype=wide.dtype)
    if dy is not None:
        dy = dy.to(wide.dtype)
        dweight, dbias = (dy * xhat).reshape(-1, C).sum(0), dy.reshape(-1, C).sum(0)
        wdy = dy if weight is None else dy * weight
        centred = wdy - wdy.mean(-1, keepdim=True) - xhat * (wdy * xhat).mean(-1, keepdim=True)
        g = g + rstd.to(wide.dtype).unsqueeze(-1) * centred
    dx = dgamma = None
    if output_mask[0]:
        dx = branch(g, gamma, row_scale, seed, dropout_p).to(x_dtype).contiguous()
    if output_mask[4]:
        dgamma = (
            (g * branch(widen(x), None, row_scale, seed, dropout_p))
            .reshape(-1, C)
            .sum(0)
            .to(gamma.dtype)
        )
    return (
        dx,
        g.to(z.dtype).contiguous() if output_mask[1] else None,
        dweight.to(weight.dtype) if output_mask[2] else None,
        dbias.to(bias.dtype) if output_mask[3] else None,
        dgamma,
    )


def layer_norm_add_fwd(x, residual, weight, bias, row_scale, eps):
    out, mean, rstd = layer_norm_add(x, residual, weight, bias, eps, row_scale)
    return out.contiguous(), mean, rstd


def layer_norm_add_bwd(dout, x, mean, rstd, weight, bias, row_scale, output_mask):
    dy = branch(widen(dout), None, row_scale, None, 0.0)
    mask = [output_mask[0], False, output_mask[1], output_mask[2], False]
    dx, _, dweight, dbias, _ = add_layer_norm_bwd(
        dy, None, x, mean, rstd, None, weight, bias, None, None, None, 0.0, x.dtype, mask
    )
    return dx, dweight, dbias


# --- what tests, benchmarks and profilers share ---------------------------------------------------


def sample_inputs():
    """(name, shape) of the activations people meet: ViT-Ti/S/B/L, Swin-T stages, a wide one."""
    return [
        ("vit_tiny", (8, 197, 192)),
        ("vit_small", (8, 197, 384)),
        ("vit_base", (8, 197, 768)),
        ("vit_large", (4, 197, 1024)),
        ("swin_tiny_stage1", (4, 3136, 96)),
        ("swin_tiny_stage3", (8, 196, 384)),
        ("wide", (2, 64, 4096)),
    ]


def cost(shape, x_bytes=2, residual_bytes=2, y_bytes=2, *, backward=False, gamma=True):
    """(FLOPs, least bytes) of one call: every activation read once and written once."""
    n = math.prod(shape)
    if not backward:
        return 10 * n, n * (x_bytes + 2 * residual_bytes + y_bytes)
    # dy, dnew_residual, z in and dresidual out; with LayerScale also x in (for dgamma) and dx out.
    return 20 * n, n * (y_bytes + 3 * residual_bytes + (2 * x_bytes if gamma else 0))
