"""Multiplications, activations and parameters of a ViT, counted as timm's tables count them."""

from __future__ import annotations

import dataclasses

from torch import nn


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one image; macs include five for each element of a LayerNorm, as fvcore counts it."""

    macs: int
    activations: int  # elements that Linears, convolutions and matrix products put out
    parameters: int


def cost_of(model: nn.Module) -> Cost:
    """Of a FusedViT, at its own image size."""
    H, W = model.patch_embed.grid_size
    N, C = H * W + model.num_prefix_tokens, model.embed_dim
    macs = H * W * model.patch_embed.proj.weight.numel()
    activations = H * W * C
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        for linear in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2):
            macs += N * linear.weight.numel()
            activations += N * linear.out_features
        macs += 2 * N * N * attn.num_heads * attn.head_dim
        activations += N * N * attn.num_heads + N * attn.num_heads * attn.head_dim
    if isinstance(model.head, nn.Linear):
        macs += model.head.weight.numel()
        activations += model.head.out_features
    norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(macs + 5 * norms * N * C, activations, parameters)
