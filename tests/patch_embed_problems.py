"""Problems of patch_embed, and the plain PyTorch they are measured by."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from problems import Problem

from vitkernels.ops.patch_embed import reference
from vitkernels.testing import SIXTEEN_BIT

# Of three channels, as most checkpoints have them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UINT8 = torch.uint8

# Beyond testing.LAYOUTS: how images alone come, everything else contiguous.
IMAGE_LAYOUTS = (
    "channels_last",
    "channels_last_cropped",
    "cropped",
    "rows_apart",
    "columns_apart",
    "one_image",
)


@dataclasses.dataclass
class PatchEmbedProblem(Problem):
    def laid_out(self, layout: str) -> Problem:
        if layout not in IMAGE_LAYOUTS:
            return super().laid_out(layout)
        problem = super().laid_out("contiguous")
        problem.inputs["images"] = images_in(self.inputs["images"], layout)
        return problem


def images_in(images: torch.Tensor, layout: str) -> torch.Tensor:
    """Equal images (one_image: the first, repeated) in another memory layout.

    cropped: a window of larger ones, as a view; rows_apart, columns_apart: every other row or
    column of larger ones; the rest is named after what holds in memory.
    """
    B, C, H, W = images.shape
    if layout == "channels_last":
        return images.clone(memory_format=torch.channels_last)
    if layout == "one_image":
        return images[:1].clone().expand(B, C, H, W)
    # NaN, or 77, around what is used
    larger = {"rows_apart": (2 * H, W), "columns_apart": (H, 2 * W)}.get(layout, (H + 5, W + 7))
    fill = float("nan") if images.is_floating_point() else 77
    whole = torch.full((B, C, *larger), fill, dtype=images.dtype, device=images.device)
    if layout == "channels_last_cropped":
        whole = whole.contiguous(memory_format=torch.channels_last)
    window = {
        "rows_apart": whole[:, :, ::2],
        "columns_apart": whole[..., ::2],
    }.get(layout, whole[:, :, 3 : 3 + H, 5 : 5 + W])
    return window.copy_(images)


def patch_embed_problem(
    grid,
    patch,
    D,
    images_dtype=UINT8,
    dtype=torch.float32,
    *,
    B=2,
    Cin=3,
    weight_dtype=None,
    bias=True,
    bias_dtype=None,
    pos="all",
    pos_dtype=None,
    prefix=1,
    prefix_dtype=None,
    mean=MEAN,
    std=STD,
    autocast=None,
    seed=5,
) -> Problem:
    """`grid` patches of size `patch`, both a number or a pair.

    dtype: the parameters' (weight_dtype and the others default to it). pos: "all", "patches" (no
    position for the prefix tokens) or None. prefix: the number of prefix tokens, None for none.
    Statistics of three channels stand for other numbers of channels by repetition.
    """
    generator = torch.Generator().manual_seed(seed)
    (rows, columns), (ph, pw) = _pair(grid), _pair(patch)
    N, P, K = rows * columns, prefix or 0, Cin * ph * pw
    weight_dtype = weight_dtype or dtype
    shape = (B, Cin, rows * ph, columns * pw)

    def normal(size, scale):
        return scale * torch.randn(size, generator=generator)

    if images_dtype == UINT8:
        images = torch.randint(0, 256, shape, dtype=UINT8, generator=generator)
    else:
        images = torch.rand(shape, generator=generator).to(images_dtype)
    positions = {"all": P + N, "patches": N, None: None}[pos]
    inputs = {
        "images": images,
        "weight": normal((D, Cin, ph, pw), K**-0.5).to(weight_dtype),
        "bias": normal((D,), 0.5).to(bias_dtype or dtype) if bias else None,
        "pos_embed": normal((1, positions or 0, D), 0.5).to(pos_dtype or dtype) if pos else None,
        "prefix_tokens": None if prefix is None else normal((1, P, D), 1.0).to(
            prefix_dtype or dtype
        ),
    }  # fmt: skip
    mean, std = (s if not isinstance(s, tuple) else (s * Cin)[:Cin] for s in (mean, std))
    own = weight_dtype if images_dtype == UINT8 else images_dtype
    out_dtype = autocast or own
    return PatchEmbedProblem(
        "patch_embed",
        inputs,
        {"mean": mean, "std": std},
        spec_patch_embed,
        functools.partial(eager_patch_embed, out_dtype=out_dtype),
        ("tokens",),
        (("images",), ("weight",), ("bias",), ("pos_embed",), ("prefix_tokens",)),
        out_dtype if out_dtype in SIXTEEN_BIT else None,
        seed,
        autocast,
    )


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)


def _statistics(images, mean, std, dtype):
    """As the public function takes them: rounded to fp32 first, both or neither."""
    if mean is None and std is None:
        return None, None
    Cin = images.shape[1]
    values = (0.0 if mean is None else mean, 1.0 if std is None else std)
    return tuple(
        torch.as_tensor(v, dtype=torch.float32, device=images.device).expand(Cin).to(dtype)
        for v in values
    )


def spec_patch_embed(*, images, weight, bias, pos_embed, prefix_tokens, mean, std, seed):
    """The truth: the specification, differentiated by autograd."""
    mean, std = _statistics(images, mean, std, torch.float64)
    return reference.patch_embed(
        images, weight, bias, pos_embed, prefix_tokens, mean, std, torch.float64
    )


def eager_patch_embed(
    *, images, weight, bias, pos_embed, prefix_tokens, mean, std, seed, out_dtype
):
    """The yardstick: ToTensor, Normalize in fp32, then timm's embedding in the tested dtype."""
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    mean, std = _statistics(images, mean, std, wide)
    x = images.to(wide) / 255 if images.dtype == UINT8 else images.to(wide)
    if mean is not None:
        x = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    weight, bias, pos, prefix = (
        None if t is None else t.to(out_dtype) for t in (weight, bias, pos_embed, prefix_tokens)
    )
    x = F.conv2d(x.to(out_dtype), weight, bias, stride=weight.shape[-2:])
    x = x.flatten(2).transpose(1, 2)
    patches_only = pos is not None and pos.shape[1] == x.shape[1]
    x = x + pos if patches_only else x
    x = x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
    return x if pos is None or patches_only else x + pos
