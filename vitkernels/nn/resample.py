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
    basis = torch.eye(size, device=weight.device, dtype=torch.float32).reshape(size, 1, *old_size)
    resized = F.interpolate(
        basis, size=tuple(new_size), mode=mode, antialias=antialias, align_corners=False
    )
    resize = resized.flatten(1).T  # (P*P, p*p)
    resampled = weight.float().flatten(2) @ torch.linalg.pinv(resize)
    return resampled.reshape(*weight.shape[:2], *new_size).to(weight.dtype)


def resample_bias_table(
    table: Tensor, new_window: tuple[int, int], old_window: tuple[int, int]
) -> Tensor:
    """((2h-1)(2w-1), heads) -> ((2H-1)(2W-1), heads): the biases of a window of another size.

    Linear in fp32 between distances that grow geometrically from the centre, so that near pairs
    keep their biases, as timm resizes the tables of Swin and BEiT. Source: Bao et al. 2022 (BEiT).
    """
    if tuple(new_window) == tuple(old_window):
        return table
    old_size = [2 * w - 1 for w in old_window]
    grid = table.float().reshape(*old_size, -1)
    for axis in range(2):
        weights = _distances_to_distances(new_window[axis], old_window[axis]).to(table.device)
        grid = torch.tensordot(weights, grid.movedim(axis, 0), dims=1).movedim(0, axis)
    return grid.reshape(-1, table.shape[-1]).to(table.dtype)


def _distances_to_distances(new: int, old: int) -> Tensor:
    """(2*new-1, 2*old-1): each row's linear weights of the old distances at a new distance."""
    fp32 = {"dtype": torch.float32}  # whatever torch.set_default_dtype says
    if old == 1:
        return torch.ones(2 * new - 1, 1, **fp32)
    low, high = 1.01, 1.5  # the common ratio with which `old` steps reach `new`
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1:
            high = ratio
        else:
            low = ratio
    steps = [sum(ratio**j for j in range(i + 1)) for i in range(old - 1)]
    at = torch.tensor([-step for step in reversed(steps)] + [0.0] + steps, **fp32)
    wanted = torch.arange(1 - new, new, **fp32).clamp(at[0], at[-1])
    right = torch.bucketize(wanted, at).clamp(min=1)
    left_share = (at[right] - wanted) / (at[right] - at[right - 1])
    weights = torch.zeros(2 * new - 1, at.numel(), **fp32)
    rows = torch.arange(2 * new - 1)
    weights[rows, right - 1] = left_share
    weights[rows, right] += 1 - left_share
    return weights
