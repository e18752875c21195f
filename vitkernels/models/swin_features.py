"""Features of the stages of Swin, with timm's methods and return values, and attention maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.layer_norm import LayerNorm
from ..nn.windows import Pair, Windows
from ..ops.window_attention.reference import to_windows


class WindowMap(NamedTuple):
    """Where the windows of one block look.

    weights (B, windows, heads, N, N), fp32: rows are queries, each sums to 1. tokens (windows, N):
    which token of the map (row * W + column) is where, -1 for padding. size: (H, W) of the map.
    """

    weights: Tensor
    tokens: Tensor
    window: Pair
    shift: Pair
    size: Pair


class SwinFeatures:
    """Methods of a model that has patch_embed, layers, norm, feature_info and reset_classifier."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of the stages `indices` (an int: the last n; None: all), as timm returns them:
        NCHW; norm acts on the last stage's."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be NCHW or NHWC, got {output_fmt!r}"
            )
        take, last = self._take(indices), len(self.layers) - 1
        x = self.patch_embed(x)
        outputs, i = [], 0
        for i, stage in enumerate(self.layers[: max(take) + 1] if stop_early else self.layers):
            x = stage(x)
            if i in take:
                outputs.append(self.norm(x) if norm and i == last else x)
        if output_fmt == "NCHW":
            outputs = [y.permute(0, 3, 1, 2).contiguous() for y in outputs]
        if intermediates_only:
            return outputs
        return (self.norm(x) if i == last else x), outputs

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages `indices` do not need."""
        take = self._take(indices)
        end = max(take)
        shorter = end < len(self.layers) - 1
        if prune_norm or shorter:  # the norm is as wide as the last stage
            self.norm = nn.Identity()
        self.layers = self.layers[: end + 1]
        self._ref_window_sizes = self._ref_window_sizes[: end + 1]
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[end]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def _take(self, indices) -> list[int]:
        stages = len(self.layers)
        last = stages if indices is None else indices
        wanted = range(-last, 0) if isinstance(last, int) else last
        if len(wanted) == 0 or not all(-stages <= i < stages for i in wanted):
            raise ValueError(
                f"FusedSwin: stage indices must be in [-{stages}, {stages}), got {indices}"
            )
        return [i % stages for i in wanted]

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> list[WindowMap]:
        """A WindowMap of every block, first block first. Only this call computes them."""
        maps: list[WindowMap] = []

        def keep(attn: nn.Module, inputs: tuple, options: dict) -> None:
            x, windows = inputs[0], options["windows"]
            H, W = x.shape[1:3]
            tokens = token_of_window(H, W, windows)
            weights = attn.weights(x, windows)
            maps.append(WindowMap(weights, tokens, windows.size, windows.shift, (H, W)))

        blocks = [block for stage in self.layers for block in stage.blocks]
        handles = [block.attn.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
        try:
            self.forward_features(images)
        finally:
            for handle in handles:
                handle.remove()
        return maps


def token_of_window(H: int, W: int, windows: Windows) -> Tensor:
    """(windows, N): the token of an H x W map that each place of each window holds, -1: padding."""
    numbered = torch.arange(1, H * W + 1).reshape(1, H, W, 1)
    return to_windows(windows.fit(numbered), windows.size, windows.shift)[0, :, :, 0] - 1


class FeaturePyramid(nn.Module):
    """NCHW maps of the stages `indices` of a FusedSwin, for detection and segmentation.

        pyramid = FeaturePyramid(FusedSwin(strict_img_size=False), norms=True)
        c2, c3, c4, c5 = pyramid(images)

    norms: each map goes through a LayerNorm of its own, norm{stage}, as in Microsoft's detection
    code. What the maps do not need is pruned from the model. channels and reductions tell a neck
    the width and stride of each map.
    """

    def __init__(self, model: nn.Module, indices: int | list[int] | None = None, norms=False):
        super().__init__()
        info = list(model.feature_info)
        wanted = len(info) if indices is None else indices
        self.indices = sorted(set(model.prune_intermediate_layers(wanted, prune_norm=True)))
        self.channels = [info[i]["num_chs"] for i in self.indices]
        self.reductions = [info[i]["reduction"] for i in self.indices]
        self.model, some = model, next(model.parameters())
        if norms:
            for i, width in zip(self.indices, self.channels, strict=True):
                norm = LayerNorm(width, eps=1e-5, device=some.device, dtype=some.dtype)
                self.add_module(f"norm{i}", norm)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model.forward_intermediates(
            images, self.indices, output_fmt="NHWC", intermediates_only=True
        )
        if hasattr(self, f"norm{self.indices[0]}"):
            named = zip(self.indices, maps, strict=True)
            maps = [self.get_submodule(f"norm{i}")(x) for i, x in named]
        return [x.permute(0, 3, 1, 2).contiguous() for x in maps]
