"""Where a ViT looks: attention maps of every block, and attention rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, rows=None) -> list[Tensor]:
    """One (B, heads, rows, N) tensor for each block: the softmax of its scores, fp32.

    rows: query tokens: 0 is the class token, None is all of them. Only this call computes the maps;
    the model's own forward never stores them.
    """
    maps: list[Tensor] = []

    def keep(attn: nn.Module, inputs: tuple) -> None:
        maps.append(attn.weights(inputs[0], rows))

    handles = [block.attn.register_forward_pre_hook(keep) for block in model.blocks]
    try:
        model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def attention_rollout(maps: Sequence[Tensor]) -> Tensor:
    """(B, N, N): how much of each input token reaches each token after the last block.

    R = A_L ... A_2 A_1 with A_l = (mean over heads + identity) / 2, rows summing to 1.
    maps: full maps (B, heads, N, N) of every block, first block first.
    Source: Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, section 3.
    """
    if not maps or any(m.ndim != 4 or m.shape[-1] != m.shape[-2] for m in maps):
        raise ValueError("attention_rollout: maps must be full (B, heads, N, N) maps, all rows")
    identity = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    rollout = identity
    for attention in maps:
        rollout = (0.5 * attention.mean(1) + 0.5 * identity) @ rollout
    return rollout
