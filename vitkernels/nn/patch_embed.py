"""Patch embedding: one projection for each patch of the image; timm's arguments and keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import describe, fail, positive_int
from .._dispatch import autocast_dtype
from ..ops import patch_embed
from .pixels import PixelNormalization
from .resample import resample_patch_embed
from .watched import global_hooks, plain, untouched


def pair(value) -> tuple[int, int]:
    """(height, width) from one number or a pair."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


class PatchEmbed(PixelNormalization):
    """images (B, in_chans, H, W) -> (B, H/p * W/p, embed_dim), or (B, H/p, W/p, embed_dim).

    flatten=False and output_fmt="NHWC" keep the grid; flatten=False alone gives NCHW. mean, std:
    of each channel in units of images in [0, 1], for uint8 images.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer=None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        mean: float | tuple[float, ...] = 0.5,
        std: float | tuple[float, ...] = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if output_fmt not in (None, "NCHW", "NHWC"):
            raise ValueError(
                f"PatchEmbed: output_fmt must be NCHW, NHWC or None, got {output_fmt!r}"
            )
        where = {"device": device, "dtype": dtype}
        self._set_sizes(img_size, patch_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.dynamic_img_crop = False  # True: pixels beyond whole patches are left out
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **where
        )
        self.norm = norm_layer(embed_dim, **where) if norm_layer else nn.Identity()
        self._keep_normalization(mean, std, in_chans)

    def _set_sizes(self, img_size, patch_size) -> None:
        """Nothing is set where one of them is wrong."""
        img_size, patch_size = sides("img_size", img_size), sides("patch_size", patch_size)
        if any(s < p for s, p in zip(img_size, patch_size, strict=True)):
            fail("PatchEmbed", "img_size", f"at least patch_size = {patch_size}", img_size)
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True):
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of an image of this size."""
        (H, W), (ph, pw) = img_size, self.patch_size
        return (
            (math.ceil(H / ph), math.ceil(W / pw)) if self.dynamic_img_pad else (H // ph, W // pw)
        )

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Another image size; another patch size resamples the projection (FlexiViT)."""
        old_patch = self.patch_size
        self._set_sizes(
            self.img_size if img_size is None else img_size,
            old_patch if patch_size is None else patch_size,
        )
        if self.patch_size != old_patch:
            weight = resample_patch_embed(self.proj.weight.detach(), self.patch_size)
            self.proj.weight = nn.Parameter(weight, self.proj.weight.requires_grad)
            self.proj.kernel_size = self.proj.stride = self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """images: uint8, normalised here, or float, taken as normalised, in the weight's dtype."""
        grid = self.dynamic_feat_size(tuple(x.shape[-2:]))
        if self.in_one_call():
            x = self.tokens(x)
            x = x if self.flatten else x.unflatten(1, grid)
            if not self.flatten and self.output_fmt == "NCHW":
                x = x.permute(0, 3, 1, 2)
            return self.norm(x)
        x = self.proj(self._normalized(self._fit(x)))
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)
        elif self.output_fmt == "NHWC":
            x = x.permute(0, 2, 3, 1)
        return self.norm(x)

    def tokens(
        self, x: Tensor, pos_embed: Tensor | None = None, prefix_tokens: Tensor | None = None
    ) -> Tensor:
        """(B, prefix + patches, embed_dim) in one pass; see vitkernels.ops.patch_embed."""
        x = self._fit(x)
        (H, W), (ph, pw) = x.shape[-2:], self.patch_size
        if H % ph or W % pw:  # what a convolution leaves out
            x = x[..., : H // ph * ph, : W // pw * pw]
        mean, std = (self.mean, self.std) if x.dtype == torch.uint8 else (None, None)
        return patch_embed(
            x, self.proj.weight, self.proj.bias,
            pos_embed=pos_embed, prefix_tokens=prefix_tokens, mean=mean, std=std,
        )  # fmt: skip

    def in_one_call(self) -> bool:
        """Whether the projection is a plain one that nobody hooks into."""
        proj = self.proj
        return (
            untouched(proj, nn.Conv2d)
            and not global_hooks()
            and plain(proj.weight)
            and proj.stride == proj.kernel_size == self.patch_size
            and (proj.padding, proj.dilation, proj.groups) == ((0, 0), (1, 1), 1)
        )

    def _fit(self, x: Tensor) -> Tensor:
        """In the weight's dtype when float; padded to whole patches with dynamic_img_pad, else of
        a size that the model takes."""
        if x.is_floating_point() and autocast_dtype(x.device) is None:
            x = x.to(self._parameter().dtype)
        H, W = x.shape[-2:]
        ph, pw = self.patch_size
        if self.strict_img_size:
            torch._assert(
                self.img_size == (H, W),
                f"PatchEmbed: image is {H}x{W}, the model takes {self.img_size}",
            )
        elif not (self.dynamic_img_pad or self.dynamic_img_crop):
            torch._assert(
                H % ph == 0 and W % pw == 0,
                f"PatchEmbed: image is {H}x{W}, not a multiple of the patch {self.patch_size}",
            )
        if not self.dynamic_img_pad or (x.dtype == torch.uint8 and H % ph == W % pw == 0):
            return x
        return F.pad(self._normalized(x), (0, -W % pw, 0, -H % ph))  # zeros, after normalisation


def sides(name: str, value, owner: str = "PatchEmbed") -> tuple[int, int]:
    """(height, width) from a positive int or a pair of them."""
    found = pair(value)
    if len(found) != 2:
        fail(owner, name, "one size or (height, width)", describe(value))
    for side in found:
        positive_int(owner, name, side)
    return found
