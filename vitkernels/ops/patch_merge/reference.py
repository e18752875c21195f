"""The specification of patch_merge_layer_norm: plain PyTorch, obvious, correct in float64.

Corner case that every backend follows: a zero that pads an odd size is part of its row's
statistics.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def merge(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 4 * C): pixels (0,0), (1,0), (0,1), (1,1) of
    each 2 x 2 patch (row, column), each with its C channels; zeros beyond an odd edge."""
    H, W = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, row, W/2, column, C)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


def unmerge(y: Tensor, size) -> Tensor:
    """The transpose of merge: (B, ceil(H / 2), ceil(W / 2), 4 * C) -> (B, H, W, C)."""
    H, W = size
    x = y.unflatten(3, (2, 2, -1)).permute(0, 1, 4, 2, 3, 5)
    return x.flatten(3, 4).flatten(1, 2)[:, :H, :W]


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def patch_merge_layer_norm(x, weight, bias, eps, out_dtype):
    """LayerNorm(merge(x)) * weight + bias. Returns y, mean, rstd."""
    z = merge(widen(x))
    mean = z.mean(-1, keepdim=True)
    rstd = (z - mean).square().mean(-1, keepdim=True).add(eps).rsqrt()
    y = (z - mean) * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(out_dtype), mean.squeeze(-1), rstd.squeeze(-1)


# --- raw operators --------------------------------------------------------------------------------


def patch_merge_layer_norm_fwd(x, weight, bias, eps, out_dtype):
    y, mean, rstd = patch_merge_layer_norm(x, weight, bias, eps, out_dtype)
    return y.contiguous(), mean, rstd


def patch_merge_layer_norm_bwd(dy, x, mean, rstd, weight, bias, output_mask):
    z = merge(widen(x))
    C = z.shape[-1]
    rstd = rstd.to(z.dtype).unsqueeze(-1)
    xhat = (z - mean.to(z.dtype).unsqueeze(-1)) * rstd
    dy = dy.to(z.dtype)
    dx = None
    if output_mask[0]:
        wdy = dy if weight is None else dy * weight
        centred = wdy - wdy.mean(-1, keepdim=True) - xhat * (wdy * xhat).mean(-1, keepdim=True)
        dx = unmerge(rstd * centred, x.shape[1:3]).to(x.dtype).contiguous()
    return (
        dx,
        (dy * xhat).reshape(-1, C).sum(0).to(weight.dtype) if output_mask[1] else None,
        dy.reshape(-1, C).sum(0).to(bias.dtype) if output_mask[2] else None,
    )


# --- what tests, benchmarks and profilers share ---------------------------------------------------


def sample_inputs():
    """(name, shape) of the maps people meet: Swin-T and Swin-B at 224 pixels, an odd one."""
    return [
        ("swin_tiny_stage1", (8, 56, 56, 96)),
        ("swin_tiny_stage2", (8, 28, 28, 192)),
        ("swin_tiny_stage3", (8, 14, 14, 384)),
        ("swin_base_stage1", (4, 56, 56, 128)),
        ("odd", (4, 57, 43, 96)),
    ]


def cost(shape, x_bytes=2, y_bytes=2, *, backward=False):
    """(FLOPs, least bytes) of one call: every activation read once and written once."""
    n = math.prod(shape)
    if backward:  # dy and x in, dx out
        return 20 * n, n * (y_bytes + 2 * x_bytes)
    return 8 * n, n * (x_bytes + y_bytes)
