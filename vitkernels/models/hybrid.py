"""FusedHybridViT: a CNN in front of the Vision Transformer (Dosovitskiy et al. 2021, section 3.1).

    images -> CNN -> patches of its map -> + class token, position -> blocks -> norm -> pool -> head

The CNN is the ResNet of the JAX and timm checkpoints (standardised convolutions, GroupNorm, SAME
padding), or any module that returns a map. state_dict keys are those of timm's VisionTransformer
with a HybridEmbed.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from ..nn import HybridEmbed, ResNetStem, ResNetV2
from ..nn.watched import untouched
from .hybrid_loaders import HybridLoaders
from .vit import FusedViT


class FusedHybridViT(HybridLoaders, FusedViT):
    """Hybrid of a CNN and a Vision Transformer on fused kernels.

    backbone: the numbers of blocks of the ResNet's stages, as (3, 4, 9) for R50 with stride 16; ()
    for its stem alone; or a module that returns a map (B, C, h, w), or several of which the last
    counts: it is taken as it is, and its weights are not initialised anew. patch_size is in pixels
    of the map. feature_size, feature_ratio, proj: see vitkernels.nn.HybridEmbed. The others are
    FusedViT's, and so are the methods.
    """

    def __init__(
        self,
        backbone: nn.Module | tuple[int, ...] = (3, 4, 9),
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        *,
        feature_size: int | tuple[int, int] | None = None,
        feature_ratio: int | tuple[int, int] | None = None,
        proj: bool = True,
        device=None,
        dtype=None,
        **settings,
    ):
        own = not isinstance(backbone, nn.Module)
        if own:
            where = {"device": device, "dtype": dtype}
            backbone = make_backbone(backbone, in_chans, **where)
        embed_layer = functools.partial(
            HybridEmbed,
            backbone=backbone,
            feature_size=feature_size,
            feature_ratio=feature_ratio,
            proj=proj,
            init_backbone=own,
        )
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_layer=embed_layer,
            device=device,
            dtype=dtype,
            **settings,
        )

    def _embed(self, x: Tensor) -> Tensor:
        if not self._embeds_in_one_call(x):
            return super()._embed(x)
        maps = self.patch_embed.maps(x)
        (h, w), (ph, pw) = maps.shape[-2:], self.patch_embed.patch_size
        return self._tokens(maps, (h // ph, w // pw))

    def _has_plain_embed(self) -> bool:
        return untouched(self.patch_embed, HybridEmbed) and self.patch_embed.in_one_call()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the blocks, and of the backbone's where it has them."""
        super().set_grad_checkpointing(enable)
        self.patch_embed.set_grad_checkpointing(enable)


def make_backbone(layers, in_chans: int, **where) -> nn.Module:
    """The ResNet of these stages, or its stem alone."""
    if not isinstance(layers, (tuple, list)):
        raise TypeError(
            "FusedHybridViT: backbone must be a module or the numbers of blocks of the ResNet's "
            f"stages, got {layers!r}"
        )
    if len(layers) == 0:
        return ResNetStem(in_chans, **where)
    return ResNetV2(tuple(layers), in_chans=in_chans, **where)
