"""Position embeddings and patch projections at another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_pos_embed(
    pos_embed: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int],
    num_prefix_tokens: int,
    mode: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """(1, P + h*w, C) -> (1, P + H*W, C), interpolated in fp32; prefix tokens are kept."""
    if tuple(new_size) == tuple(old_size):
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = grid.float().reshape(1, *old_size, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new_size), mode=mode, antialias=antialias)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1) if num_prefix_tokens else grid


def resample_patch_embed(
    weight: Tensor, new_size: tuple[int, int], mode: str = "bicubic", antialias: bool = True
) -> Tensor:
    """(D, Cin, p, p) -> (D, Cin, P, P), so that a resized patch embeds as before.

    The pseudo-inverse of resizing, fp32. Source: Beyer et al. 2023 (FlexiViT), section 3.
    """
    old_size = tuple(weight.shape[-2:])
    if old_size == tuple(new_size):
        return weight
    size = old_size[0] * old_size[1]
    basis = torch.eye(size, device=weight.device).reshape(size, 1, *old_size)
    resized = F.interpolate(
        basis, size=tuple(new_size), mode=mode, antialias=antialias, align_corners=False
    )
    resize = resized.flatten(1).T  # (P*P, p*p)
    resampled = weight.float().flatten(2) @ torch.linalg.pinv(resize)
    return resampled.reshape(*weight.shape[:2], *new_size).to(weight.dtype)
