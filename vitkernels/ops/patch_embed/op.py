"""patch_embed: public function, backends, schemas, fakes, autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ... import _checks
from ..._autograd import once_differentiable
from ..._dispatch import (
    Backend,
    choose,
    computed_dtype,
    declare,
    keep_signature,
    needs_autograd,
    overload,
    without_matrix_unit,
)
from . import reference

Tensor = torch.Tensor
EVERY_FLOAT = _checks.FLOAT_DTYPES


# Order of preference. Images are uint8 or float, every parameter has its own dtype.
BACKENDS = (
    Backend("cpu", auto=without_matrix_unit),
    Backend("cuda"),
    Backend("triton"),
    Backend("torch", EVERY_FLOAT),
    Backend("reference", EVERY_FLOAT),
)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Images to tokens in one pass: normalisation, patch projection, position, prefix tokens.

    ``tokens[:, P + n] = weight * (patch_n - mean) / std + bias + pos_embed[n]`` for the N patches
    in row-major order, behind the P prefix tokens (class, registers) and their positions.

    Args:
        images: (B, Cin, H, W); uint8, which is scaled to [0, 1] first, or fp32, bf16, fp16
        (float64: reference). Any strides; contiguous and channels_last are read in place.
        weight: (D, Cin, ph, pw), of a convolution with stride (ph, pw); H and W are multiples.
        bias: (D,) or None. Parameters may stay fp32; each gradient has its parameter's dtype.
        pos_embed: (1, P + N, D), or (1, N, D) for the patches only, or None.
        prefix_tokens: (1, P, D) or None.
        mean, std: of each channel, in units of images in [0, 1]: a float, Cin floats, or a (Cin,)
        tensor on the images' device (which saves a copy in each call). None is 0 and 1.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        tokens: (B, P + N, D), contiguous, in the autocast dtype under torch.autocast, else in the
        images' dtype, or the weight's for uint8 images.

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: Dosovitskiy et al. 2021, section 3.1; register tokens, Darcet et al. 2024.
    """
    _check(images, weight, bias, pos_embed, prefix_tokens)
    own = weight.dtype if images.dtype == torch.uint8 else images.dtype
    out_dtype = computed_dtype(own, images.device)
    mean, std = _statistics(images, mean, std, out_dtype)
    tensors = (images, weight, bias, pos_embed, prefix_tokens)
    floats = [t.dtype for t in tensors if t is not None and t.dtype != torch.uint8]
    training = needs_autograd(*tensors)
    sizes = (weight.shape[1:].numel(),)
    dtypes = (*floats, out_dtype)
    chosen = choose(
        "patch_embed", BACKENDS, backend, images.device, dtypes, training=training, sizes=sizes
    )
    args = (*tensors, mean, std, out_dtype)
    if chosen == "torch":
        return _stock(*args)
    if training:
        return _PatchEmbed.apply(chosen, *args)
    return overload("patch_embed_fwd", chosen)(*args)


# --- checks ---------------------------------------------------------------------------------------


def _check(images, weight, bias, pos_embed, prefix_tokens):
    op = "patch_embed"
    dtypes = (torch.uint8, *EVERY_FLOAT)
    _checks.tensor(op, "images", images, dtypes=dtypes, ndim=4, meaning="(B, Cin, H, W)")
    _checks.tensor(op, "weight", weight, like=images, ndim=4, meaning="(D, Cin, ph, pw)")
    (_, Cin, H, W), (D, channels, ph, pw) = images.shape, weight.shape
    if Cin != channels or Cin == 0 or min(D, ph, pw) == 0:
        expected = f"of shape (D, {Cin}, ph, pw) = (D, Cin, ph, pw), none of them 0"
        _checks.fail(op, "weight", expected, _checks.describe(weight))
    if H % ph or W % pw or H == 0 or W == 0:
        expected = f"of a height and width that are multiples of the patch {(ph, pw)}"
        _checks.fail(op, "images", expected, _checks.describe(images))
    if bias is not None:
        _checks.tensor(op, "bias", bias, like=images, shape=(D,), meaning="(D,)")
    P, N = 0, (H // ph) * (W // pw)
    if prefix_tokens is not None:
        _checks.tensor(op, "prefix_tokens", prefix_tokens, like=images, ndim=3, meaning="(1, P, D)")
        P = prefix_tokens.shape[1]
        if prefix_tokens.shape[0] != 1 or prefix_tokens.shape[2] != D:
            got = _checks.describe(prefix_tokens)
            _checks.fail(op, "prefix_tokens", f"of shape (1, P, {D}) = (1, P, D)", got)
    if pos_embed is not None:
        _checks.tensor(op, "pos_embed", pos_embed, like=images, ndim=3, meaning="(1, P + N, D)")
        one, positions, width = pos_embed.shape  # compared one by one: they may be symbolic
        if one != 1 or width != D or (positions != P + N and positions != N):
            expected = f"of shape {(1, P + N, D)} = (1, P + N, D) or {(1, N, D)} = (1, N, D)"
            _checks.fail(op, "pos_embed", expected, _checks.describe(pos_embed))


def _statistics(images, mean, std, out_dtype):
    """mean and std as (Cin,) tensors, both or neither."""
    if mean is None and std is None:
        return None, None
    dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    return (
        _statistic(images, "mean", 0.0 if mean is None else mean, dtype),
        _statistic(images, "std", 1.0 if std is None else std, dtype),
    )


def _statistic(images, name, value, dtype):
    op, Cin = "patch_embed", images.shape[1]
    if isinstance(value, Tensor):
        _checks.tensor(op, name, value, like=images, shape=(Cin,), meaning="(Cin,)")
        _checks.no_grad_tensor(op, name, value)
        return value.to(dtype).contiguous()
    if isinstance(value, (int, float)):
        value = [value] * Cin
    if not isinstance(value, (list, tuple)) or len(value) != Cin:
        _checks.fail(op, name, f"a float, {Cin} floats or a (Cin,) tensor", _checks.describe(value))
    is_std = name == "std"
    expected = "positive finite numbers" if is_std else "finite numbers"
    for number in value:
        low = 0.0 if is_std else -math.inf
        _checks.number(op, name, number, low=low, high=math.inf, low_open=True, expected=expected)
    return torch.tensor(value, dtype=dtype, device=images.device)


# --- backend "torch": stock operators, visible to autograd and torch.compile ----------------------


def _stock(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype):
    with torch.autocast(images.device.type, enabled=False):
        wide = torch.float64 if out_dtype == torch.float64 else torch.float32
        if images.dtype == torch.uint8 or mean is not None:
            images = reference.normalize(images, mean, std, wide)
        x, weight = images.to(out_dtype), weight.to(out_dtype)
        bias, pos_embed, prefix_tokens = (
            None if t is None else t.to(out_dtype) for t in (bias, pos_embed, prefix_tokens)
        )
        x = F.conv2d(x, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
        B, N, _ = x.shape
        patches_only = pos_embed is not None and pos_embed.shape[1] == N
        x = x + pos_embed if patches_only else x
        if prefix_tokens is not None:
            x = torch.cat([prefix_tokens.expand(B, -1, -1), x], dim=1)
        x = x if patches_only or pos_embed is None else x + pos_embed
        return x.contiguous()


# --- raw operators --------------------------------------------------------------------------------


def _fake_patch_embed_fwd(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype):
    B, _, H, W = images.shape
    D, _, ph, pw = weight.shape
    P = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    return weight.new_empty((B, P + (H // ph) * (W // pw), D), dtype=out_dtype)


def _fake_patch_embed_bwd(
    dtokens, images, weight, bias, pos_embed, prefix_tokens, mean, std, output_mask
):
    tensors = (images, weight, bias, pos_embed, prefix_tokens)
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip(tensors, output_mask, strict=True)
    )


declare(
    "patch_embed_fwd",
    "(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens,"
    " Tensor? mean, Tensor? std, ScalarType out_dtype) -> Tensor tokens",
    fake=_fake_patch_embed_fwd,
    reference=reference.patch_embed_fwd,
    regime=lambda images, weight, *_: ("patch_embed", (weight.shape[1:].numel(),), ""),
)
declare(
    "patch_embed_bwd",
    "(Tensor dtokens, Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed,"
    " Tensor? prefix_tokens, Tensor? mean, Tensor? std, bool[] output_mask)"
    " -> (Tensor? dimages, Tensor? dweight, Tensor? dbias, Tensor? dpos_embed,"
    " Tensor? dprefix_tokens)",
    fake=_fake_patch_embed_bwd,
    reference=reference.patch_embed_bwd,
    regime=lambda dtokens, images, weight, *_: ("patch_embed", (weight.shape[1:].numel(),), ""),
)


# --- autograd -------------------------------------------------------------------------------------


@keep_signature
class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("patch_embed_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, images, weight, bias, pos_embed, prefix_tokens, mean, std, _ = inputs
        ctx.save_for_backward(images, weight, bias, pos_embed, prefix_tokens, mean, std)
        ctx.backend = backend

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dtokens):
        output_mask = list(ctx.needs_input_grad[1:6])
        gradients = overload("patch_embed_bwd", ctx.backend)(dtokens, *saved, output_mask)
        return None, *gradients, None, None, None
