"""Features of inner blocks, with timm's methods and return values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class IntermediateFeatures:
    """Methods of a model that has _embed, blocks, norm, patch_embed and num_prefix_tokens."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Outputs of the blocks `indices` (an int: the last n; None: all), as timm returns them."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}"
            )
        take = self._take(indices)
        size = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        x = self._embed(x)
        outputs = []
        for i, block in enumerate(self.blocks[: max(take) + 1] if stop_early else self.blocks):
            if self.grad_checkpointing and attn_mask is None and not is_causal:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
            if i in take:
                outputs.append(self.norm(x) if norm else x)
        P = self.num_prefix_tokens
        prefix, outputs = [y[:, :P] for y in outputs], [y[:, P:] for y in outputs]
        if output_fmt == "NCHW":
            outputs = [y.unflatten(1, size).permute(0, 3, 1, 2).contiguous() for y in outputs]
        if output_dict:
            result = {"image_intermediates": outputs}
            if P and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else {**result, "image_features": self.norm(x)}
        if P and return_prefix_tokens:
            outputs = list(zip(outputs, prefix, strict=True))
        return outputs if intermediates_only else (self.norm(x), outputs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list:
        """DINO's interface to forward_intermediates."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm,
            output_fmt="NCHW" if reshape else "NLC", intermediates_only=True, attn_mask=attn_mask,
        )  # fmt: skip

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the blocks `indices` do not need."""
        take = self._take(indices)
        self.blocks = self.blocks[: max(take) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def _take(self, indices) -> list[int]:
        depth = len(self.blocks)
        last = depth if indices is None else indices
        wanted = range(-last, 0) if isinstance(last, int) else last
        if len(wanted) == 0 or not all(-depth <= i < depth for i in wanted):
            raise ValueError(
                f"FusedViT: block indices must be in [-{depth}, {depth}), got {indices}"
            )
        return [i % depth for i in wanted]
