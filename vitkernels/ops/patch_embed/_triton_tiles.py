"""What the Triton forward and backward of patch_embed share: pixels, channels, sizes and checks.

A row is one patch of one image, b * N + n. Images have the strides (batch, channel, row, column).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vitkernels._triton import FLOATS, INTERPRETED, Tile, capability, cdiv, check_like, fail

# Sizes of which neither alignment nor the value 1 is worth a compilation of its own.
VARYING = [
    "B", "N", "C", "P", "rows", "grid_width", "first_position", "splits", "steps_per_split",
    "images_per_split",
]  # fmt: skip


# --- device: pixels ------------------------------------------------------------------------------


@triton.jit
def patch_offset(row, N, grid_width, strides, PATCH: tl.constexpr):
    """Where the top left pixel of each patch lies; PATCH is (height, width)."""
    b = row // N
    n = row - b * N
    y = n // grid_width
    x = n - y * grid_width
    y, x = y.to(tl.int64) * PATCH[0], x.to(tl.int64) * PATCH[1]
    return b.to(tl.int64) * strides[0] + y * strides[2] + x * strides[3]


@triton.jit
def pixel_offset(k, strides, PATCH: tl.constexpr):
    """Where pixel k of one channel of a patch lies, from its top left one."""
    return (k // PATCH[1]).to(tl.int64) * strides[2] + (k % PATCH[1]).to(tl.int64) * strides[3]


@triton.jit
def channel_centre(mean_ptr, channel, IS_BYTE: tl.constexpr):
    """What is subtracted from a pixel. An integer from bytes, so that 16 bits hold the rest."""
    mean = tl.load(mean_ptr + channel)
    if IS_BYTE:
        return tl.minimum(tl.maximum(tl.floor(255.0 * mean + 0.5), 0.0), 255.0)
    else:
        return mean


@triton.jit
def channel_rest(mean_ptr, channel, IS_BYTE: tl.constexpr):
    """The centre of bytes minus 255 mean: what centring by an integer leaves to be corrected."""
    return channel_centre(mean_ptr, channel, IS_BYTE) - 255.0 * tl.load(mean_ptr + channel)


@triton.jit
def channel_scale(std_ptr, channel, IS_BYTE: tl.constexpr):
    """1 / std in units of the pixels."""
    scale = 1.0 / 255.0 if IS_BYTE else 1.0
    if std_ptr is not None:
        scale = scale / tl.load(std_ptr + channel)
    return scale


@triton.jit
def centred(pixels, centre, DOT: tl.constexpr):
    """Pixels as operands of a product: exact for bytes, rounded once for floats."""
    if centre is None:
        return pixels.to(DOT)
    else:
        return (pixels.to(tl.float32) - centre).to(DOT)


# --- host ----------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """B images of C channels and N patches, `width` in a row of them, to D features."""

    B: int
    C: int
    N: int
    D: int
    P: int
    patch: tuple[int, int]
    width: int

    @property
    def K(self) -> int:
        """Pixels in one channel of a patch."""
        return self.patch[0] * self.patch[1]


def check_patches(op, images, weight, bias, pos_embed, prefix_tokens, mean, std) -> Sizes:
    if weight.ndim != 4 or 0 in weight.shape:
        fail(op, "weight", "of shape (D, Cin, ph, pw), none of them 0", tuple(weight.shape))
    D, C, *patch = weight.shape
    if (
        images.ndim != 4
        or images.shape[1] != C
        or any(size == 0 or size % p for size, p in zip(images.shape[2:], patch, strict=True))
    ):
        expected = f"of shape (B, {C}, H, W) with H and W multiples of {tuple(patch)}"
        fail(op, "images", expected, tuple(images.shape))
    check_like(op, "images", images, images.shape, (*FLOATS, torch.uint8))
    check_like(op, "weight", weight, weight.shape)
    check_like(op, "bias", bias, (D,))
    width = images.shape[3] // patch[1]
    N, P = images.shape[2] // patch[0] * width, 0
    if prefix_tokens is not None:
        P = prefix_tokens.shape[1] if prefix_tokens.ndim == 3 else 0
        check_like(op, "prefix_tokens", prefix_tokens, (1, P, D))
    if pos_embed is not None:
        patches_only = pos_embed.ndim == 3 and pos_embed.shape[1] == N
        check_like(op, "pos_embed", pos_embed, (1, N if patches_only else P + N, D))
    check_like(op, "mean", mean, (C,), (torch.float32,))
    check_like(op, "std", std, (C,), (torch.float32,))
    return Sizes(images.shape[0], C, N, D, P, (patch[0], patch[1]), width)


def tiles_for(sm90, sm80, dtype: torch.dtype, device: torch.device) -> tuple[Tile, ...]:
    """One of two tables of 16-bit tiles, or that of fp32, whose products are FMA."""
    if dtype == torch.float32 and not INTERPRETED:
        return (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2))
    return sm90 if capability(device) >= 90 else sm80


def operand_images(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The images, but fp32 for fp32 products on sm_100.

    There Triton 3.7 multiplies fp32 that it made from 8 or 16 bits in tf32, whatever
    input_precision says (its issue 10176).
    """
    if dtype != torch.float32 or images.dtype == dtype or capability(images.device) < 100:
        return images
    return images.to(dtype)


def block_of_channel(K: int) -> int:
    """Pixels of one channel taken at once; a step costs as much as 4 more columns.

    32 for 14 x 14 (224 columns for 196) and larger patches, 16 for 4 x 4.
    """
    return min((32, 16), key=lambda block: cdiv(K, block) * (block + 4))
