"""Patch embedding: one projection for each patch of the image; timm's arguments and keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resample import resample_patch_embed


def pair(value) -> tuple[int, int]:
    """(height, width) from an int or a pair."""
    return (value, value) if isinstance(value, int) else tuple(value)


class PatchEmbed(nn.Module):
    """images (B, in_chans, H, W) -> (B, H/p * W/p, embed_dim), or (B, H/p, W/p, embed_dim).

    flatten=False and output_fmt="NHWC" keep the grid; flatten=False alone gives NCHW.
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
        device=None,
        dtype=None,
    ):
        super().__init__()
        if output_fmt not in (None, "NCHW", "NHWC"):
            raise ValueError(
                f"PatchEmbed: output_fmt must be NCHW, NHWC or None, got {output_fmt!r}"
            )
        where = {"device": device, "dtype": dtype}
        self.patch_size = pair(patch_size)
        self._set_grid(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **where
        )
        self.norm = norm_layer(embed_dim, **where) if norm_layer else nn.Identity()

    def _set_grid(self, img_size) -> None:
        self.img_size = pair(img_size)
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
        if patch_size is not None and pair(patch_size) != self.patch_size:
            self.patch_size = pair(patch_size)
            weight = resample_patch_embed(self.proj.weight.detach(), self.patch_size)
            self.proj.weight = nn.Parameter(weight, self.proj.weight.requires_grad)
            self.proj.kernel_size = self.proj.stride = self.patch_size
        self._set_grid(self.img_size if img_size is None else img_size)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        ph, pw = self.patch_size
        if self.strict_img_size:
            torch._assert(
                self.img_size == (H, W),
                f"PatchEmbed: image is {H}x{W}, the model takes {self.img_size}",
            )
        elif not self.dynamic_img_pad:
            torch._assert(
                H % ph == 0 and W % pw == 0,
                f"PatchEmbed: image is {H}x{W}, not a multiple of the patch {self.patch_size}",
            )
        if self.dynamic_img_pad:
            x = F.pad(x, (0, -W % pw, 0, -H % ph))
        x = self.proj(x)
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)
        elif self.output_fmt == "NHWC":
            x = x.permute(0, 2, 3, 1)
        return self.norm(x)
