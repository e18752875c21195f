"""patch_merge_layer_norm, and timm's PatchMerging before its reduction."""

from __future__ import annotations

import torch.nn.functional as F

from .. import ops
from ..ops.patch_merge import reference
from .subject import Subject, normal

EPS = 1e-5


def eager(x, weight, bias):
    """What timm's PatchMerging does: pad, reshape, permute, LayerNorm."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    B, H, W, C = x.shape
    x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return F.layer_norm(x, (4 * C,), weight, bias, EPS)


def truth(x, weight, bias):
    return reference.patch_merge_layer_norm(x, weight, bias, EPS, x.dtype)[0]


def subject(op, shape, device="cpu") -> Subject:
    """shape: (B, H, W, C)."""

    def ours(backend):
        def call(x, weight, bias):
            return ops.patch_merge_layer_norm(x, weight, bias, EPS, backend=backend)

        return call

    def make(seed, dtype, device="cpu"):
        random, C = normal(seed, device), 4 * shape[-1]
        return [t.to(dtype) for t in (random(*shape), 1 + random(C) / 2, random(C))]

    def cost(size, backward):
        return reference.cost(shape, size, size, backward=backward)

    sizes = (4 * shape[-1],)
    return Subject(op, tuple(shape), make, ours, eager, truth, cost, sizes)
