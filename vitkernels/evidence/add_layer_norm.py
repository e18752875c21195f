"""add_layer_norm with LayerScale and DropPath, and layer_norm_add with DropPath."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import ops
from ..ops.add_layer_norm import reference
from .subject import Subject, normal

EPS = 1e-6


def subject(op, shape, device="cpu") -> Subject:
    """A fifth of the samples is dropped."""
    row_scale = ((torch.arange(shape[0]) % 5 != 4).float() / 0.8).to(device)
    return (_add_layer_norm if op == "add_layer_norm" else _layer_norm_add)(shape, row_scale)


def _add_layer_norm(shape, row_scale) -> Subject:
    def ours(backend):
        def call(x, residual, weight, bias, gamma):
            return ops.add_layer_norm(
                x, residual, weight, bias, EPS, gamma=gamma, row_scale=row_scale, backend=backend
            )

        return call

    def eager(x, residual, weight, bias, gamma):
        """What a timm block does: LayerScale, DropPath, add, LayerNorm."""
        stream = residual + x * gamma * row_scale.to(x.dtype)[:, None, None]
        return F.layer_norm(stream, x.shape[-1:], weight, bias, EPS), stream

    def truth(x, residual, weight, bias, gamma):
        y, z, _, _ = reference.add_layer_norm(
            x, residual, weight, bias, EPS, gamma, row_scale.double(), None, 0.0, x.dtype
        )
        return y, z

    def make(seed, dtype, device="cpu"):
        random, C = normal(seed, device), shape[-1]
        inputs = [random(*shape), random(*shape), 1 + random(C) / 2, random(C), random(C)]
        return [t.to(dtype) for t in inputs]

    def cost(size, backward):
        return reference.cost(shape, size, size, size, backward=backward)

    sizes = (shape[-1],)
    return Subject("add_layer_norm", tuple(shape), make, ours, eager, truth, cost, sizes)


def _layer_norm_add(shape, row_scale) -> Subject:
    def ours(backend):
        def call(x, residual, weight, bias):
            options = {"row_scale": row_scale, "backend": backend}
            return ops.layer_norm_add(x, residual, weight, bias, EPS, **options)

        return call

    def eager(x, residual, weight, bias):
        y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        return residual + y * row_scale.to(x.dtype)[:, None, None]

    def truth(x, residual, weight, bias):
        return reference.layer_norm_add(x, residual, weight, bias, EPS, row_scale.double())[0]

    def make(seed, dtype, device="cpu"):
        random, C = normal(seed, device), shape[-1]
        inputs = [random(*shape), random(*shape), 1 + random(C) / 2, random(C)]
        return [t.to(dtype) for t in inputs]

    def cost(size, backward):
        """Forward x, residual in, out out; backward dout, x in, dx out (dresidual is dout)."""
        n = torch.Size(shape).numel()
        return (20 if backward else 10) * n, 3 * n * size

    sizes = (shape[-1],)
    return Subject("layer_norm_add", tuple(shape), make, ours, eager, truth, cost, sizes)
