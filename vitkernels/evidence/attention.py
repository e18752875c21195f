"""attention and attention_qkvpacked, with and without a learnable bias."""

from __future__ import annotations

import torch.nn.functional as F

from .. import ops
from ..ops.attention import reference
from .subject import Subject, normal


def sdpa(q, k, v, bias=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def eager(q, k, v, bias=None):
    """timm's unfused attention."""
    scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.permute(0, 2, 3, 1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def truth(q, k, v, bias=None):
    return reference.attention(q, k, v, bias, None, None, q.shape[-1] ** -0.5, 0.0)[0]


def packed(function, num_heads):
    """From the output of the qkv Linear to the input of the projection."""

    def call(qkv, bias=None):
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
        return function(q, k, v, bias).flatten(2)

    return call


def subject(op, shape, device="cpu", bias=False) -> Subject:
    """shape: (B, N, H, D); with a bias of (1, H, N, N), which gets a gradient."""
    B, N, H, D = shape
    in_one = op == "attention_qkvpacked"

    def ours(backend):
        def call(*tensors):
            inputs = tensors[: 1 if in_one else 3]
            options = {"bias": tensors[-1] if bias else None, "backend": backend}
            if in_one:
                return ops.attention_qkvpacked(*inputs, H, **options)
            return ops.attention(*inputs, **options)

        return call

    def make(seed, dtype, device="cpu"):
        random = normal(seed, device)
        sizes = [(B, N, 3 * H * D)] if in_one else [shape] * 3
        if bias:
            sizes = [*sizes, (1, H, N, N)]
        return [random(*size).to(dtype) for size in sizes]

    def cost(size, backward):
        bias_bytes = H * N * N * size if bias else 0
        return reference.cost(shape, size, backward=backward, bias_bytes=bias_bytes)

    one, stock, exact = eager, sdpa, truth
    if in_one:
        one, stock, exact = (packed(function, H) for function in (eager, sdpa, truth))
    peers, variant = {"SDPA": stock}, "bias" if bias else ""
    return Subject(op, tuple(shape), make, ours, one, exact, cost, (N, D), variant, peers)
