"""Tokens of the feature map of a CNN; timm's arguments, attributes and state_dict keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import describe, fail
from .._dispatch import autocast_dtype
from ..ops import patch_embed
from .patch_embed import pair, sides
from .pixels import PixelNormalization
from .resample import resample_patch_embed
from .watched import global_hooks, plain, untouched


class HybridEmbed(PixelNormalization):
    """images -> backbone -> map (B, C, h, w) -> projection of its patches -> (B, N, embed_dim).

    backbone: returns a map, or several in a list, tuple or dict: the last one counts. Its map is
    measured by a run on zeros, unless it has map_size(img_size) and num_features, or feature_size
    is given (then feature_ratio is image pixels for one of the map, 16 by default). proj=False: the
    map has embed_dim channels itself. init_backbone: whether initial weights are the model's
    business. mean, std: of each channel in units of images in [0, 1], for uint8 images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        img_size=224,
        patch_size=1,
        feature_size=None,
        feature_ratio=None,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer=None,
        bias: bool = True,
        proj: bool = True,
        flatten: bool = True,
        output_fmt: str | None = None,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        init_backbone: bool = False,
        mean: float | tuple[float, ...] = 0.5,
        std: float | tuple[float, ...] = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not isinstance(backbone, nn.Module):
            expected = "a module that returns a feature map"
            fail("HybridEmbed", "backbone", expected, describe(backbone), TypeError)
        if norm_layer is not None:
            fail("HybridEmbed", "norm_layer", "None: a map has its own norms", norm_layer)
        if output_fmt not in (None, "NCHW", "NHWC"):
            fail("HybridEmbed", "output_fmt", "NCHW, NHWC or None", repr(output_fmt))
        self.backbone, self.in_chans, self.init_backbone = backbone, in_chans, init_backbone
        self.dynamic_img_pad = dynamic_img_pad
        self.flatten, self.output_fmt = flatten and output_fmt is None, output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self._set_sizes(img_size, patch_size, feature_size, feature_ratio)
        width, patch = self.feature_dim, self.patch_size
        if proj:
            self.proj: nn.Module = nn.Conv2d(
                width, embed_dim, patch, patch, bias=bias, device=device, dtype=dtype
            )
        else:
            if width != embed_dim:
                expected = f"the map's channels = {width} without a projection"
                fail("HybridEmbed", "embed_dim", expected, embed_dim)
            self.proj = nn.Identity()
        self._keep_normalization(mean, std, in_chans)

    def _set_sizes(self, img_size, patch_size, feature_size=None, feature_ratio=None) -> None:
        """Nothing is set where one of them is wrong."""
        owner = "HybridEmbed"
        img_size = sides("img_size", img_size, owner)
        patch_size = sides("patch_size", patch_size, owner)
        if feature_size is None:
            width, feature_size = measured(self.backbone, self.in_chans, img_size)
            feature_ratio = tuple(s // f for s, f in zip(img_size, feature_size, strict=True))
        else:
            width, feature_size = _told_width(self.backbone), pair(feature_size)
            feature_ratio = pair(feature_ratio or 16)
        whole = all(f % p == 0 for f, p in zip(feature_size, patch_size, strict=True))
        if min(f // p for f, p in zip(feature_size, patch_size, strict=True)) == 0:
            fail(owner, "img_size", f"at least one patch of {patch_size} of the map", img_size)
        if not (whole or self.dynamic_img_pad or not self.strict_img_size):
            expected = f"a divisor of the map's size {tuple(feature_size)}"
            fail(owner, "patch_size", expected, patch_size)
        self.img_size, self.patch_size, self.feature_dim = img_size, patch_size, width
        self.feature_size, self.feature_ratio = tuple(feature_size), feature_ratio
        self.grid_size = tuple(f // p for f, p in zip(feature_size, patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @property
    def keeps_weights_of(self) -> nn.Module | None:
        """The child that initialisation leaves alone: a backbone that was handed in."""
        return None if self.init_backbone else self.backbone

    def feat_ratio(self, as_scalar: bool = True):
        ratio = tuple(r * p for r, p in zip(self.feature_ratio, self.patch_size, strict=True))
        return max(ratio) if as_scalar else ratio

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of an image of this size; of a backbone without map_size by feature_ratio."""
        if hasattr(self.backbone, "map_size"):
            return self._grid(self.backbone.map_size(img_size))
        return self._grid(tuple(s // r for s, r in zip(img_size, self.feature_ratio, strict=True)))

    def _grid(self, map_size: tuple[int, int]) -> tuple[int, int]:
        (h, w), (ph, pw) = map_size, self.patch_size
        return (
            (math.ceil(h / ph), math.ceil(w / pw)) if self.dynamic_img_pad else (h // ph, w // pw)
        )

    def set_input_size(
        self, img_size=None, patch_size=None, feature_size=None, feature_ratio=None
    ) -> None:
        """Another image size; another patch size resamples the projection."""
        old_patch, proj = self.patch_size, self.proj
        changes = patch_size is not None and pair(patch_size) != old_patch
        if changes and not isinstance(proj, nn.Conv2d):
            fail("HybridEmbed", "patch_size", f"{old_patch} without a projection", patch_size)
        self._set_sizes(
            self.img_size if img_size is None else img_size,
            old_patch if patch_size is None else patch_size,
            feature_size,
            feature_ratio,
        )
        if self.patch_size != old_patch:
            weight = resample_patch_embed(proj.weight.detach(), self.patch_size)
            proj.weight = nn.Parameter(weight, proj.weight.requires_grad)
            proj.kernel_size = proj.stride = self.patch_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable=enable)
        elif hasattr(self.backbone, "grad_checkpointing"):
            self.backbone.grad_checkpointing = enable

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """images: uint8, normalised here, or float, taken as normalised."""
        x = self.maps(x)
        if self.in_one_call() and autocast_dtype(x.device) is None:
            grid = self._grid(tuple(x.shape[-2:]))
            x = self.tokens(x)
            x = x if self.flatten else x.unflatten(1, grid)
            return x.permute(0, 3, 1, 2) if not self.flatten and self.output_fmt == "NCHW" else x
        x = self.proj(x)
        if self.flatten:
            return x.flatten(2).transpose(1, 2)
        return x.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else x

    def maps(self, x: Tensor) -> Tensor:
        """The backbone's map, padded to whole patches with dynamic_img_pad."""
        if x.is_floating_point() and autocast_dtype(x.device) is None:
            x = x.to(self._parameter().dtype)
        if self.strict_img_size:
            H, W = x.shape[-2:]
            torch._assert(
                self.img_size == (H, W),
                f"HybridEmbed: image is {H}x{W}, the model takes {self.img_size}",
            )
        x = last_map(self.backbone(self._normalized(x)))
        if not self.dynamic_img_pad:
            return x
        (h, w), (ph, pw) = x.shape[-2:], self.patch_size
        return F.pad(x, (0, -w % pw, 0, -h % ph))

    def tokens(
        self, x: Tensor, pos_embed: Tensor | None = None, prefix_tokens: Tensor | None = None
    ) -> Tensor:
        """(B, prefix + patches, embed_dim) of a map in one pass; see vitkernels.ops.patch_embed."""
        (h, w), (ph, pw) = x.shape[-2:], self.patch_size
        if h % ph or w % pw:  # what a convolution leaves out
            x = x[..., : h // ph * ph, : w // pw * pw]
        return patch_embed(
            x, self.proj.weight, self.proj.bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens
        )

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


def last_map(out) -> Tensor:
    """The last map of what a backbone returns."""
    if isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, (list, tuple)) and len(out) > 0:
        out = out[-1]
    if not isinstance(out, Tensor) or out.ndim != 4:
        fail("HybridEmbed", "backbone", "a module that returns a map (B, C, h, w)", describe(out))
    return out


@torch.no_grad()
def measured(backbone: nn.Module, in_chans: int, img_size) -> tuple[int, tuple[int, int]]:
    """(channels, size) of the map that an image of this size gives; modes are left as they are."""
    if hasattr(backbone, "map_size") and hasattr(backbone, "num_features"):
        return backbone.num_features, backbone.map_size(img_size)
    some = next(backbone.parameters(), torch.empty(0))
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        backbone.eval()
        zeros = torch.zeros(1, in_chans, *img_size, device=some.device, dtype=some.dtype)
        found = last_map(backbone(zeros))
    finally:
        for module, mode in modes:
            module.training = mode
    return found.shape[1], tuple(found.shape[-2:])


def _told_width(backbone: nn.Module) -> int:
    """Channels of the map by the backbone's own word."""
    info = getattr(backbone, "feature_info", None)
    if hasattr(info, "channels"):
        return info.channels()[-1]
    if not hasattr(backbone, "num_features"):
        expected = "None: the backbone has neither feature_info nor num_features"
        fail("HybridEmbed", "feature_size", expected, "a size")
    return backbone.num_features
