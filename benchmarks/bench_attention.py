"""attention and attention_qkvpacked, beside SDPA, eager PyTorch and torch.compile of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkernels.ops import attention, attention_qkvpacked
from vitkernels.ops.attention import reference

from .harness import BOTH, FORWARD, Case
from .shapes import ATTENTION_TARGETS, DTYPES


def sdpa(q, k, v):
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def eager(q, k, v):
    """timm's unfused attention."""
    scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def truth(q, k, v):
    return reference.attention(q, k, v, None, None, None, q.shape[-1] ** -0.5, 0.0)[0]


def packed(function, num_heads):
    """From the output of the qkv Linear to the input of the projection."""

    def call(qkv):
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
        return function(q, k, v).flatten(2)

    return call


def case(op, name, shape, dtype, direction) -> Case:
    B, N, H, D = shape
    flops, moved = reference.cost(shape, dtype.itemsize)
    if direction == BOTH:
        more_flops, more = reference.cost(shape, dtype.itemsize, backward=True)
        flops, moved = flops + more_flops, moved + more

    def make_inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        sizes = [(B, N, 3 * H * D)] if op == "attention_qkvpacked" else [shape] * 3
        return [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    functions = {"vitkernels": attention, "eager": eager, "SDPA": sdpa}
    exact = truth
    if op == "attention_qkvpacked":
        functions = {name: packed(function, H) for name, function in functions.items()}
        functions["vitkernels"] = lambda qkv: attention_qkvpacked(qkv, H)
        exact = packed(truth, H)
    targets = ATTENTION_TARGETS.get((name, dtype, direction), {})
    return Case(
        op, name, tuple(shape), dtype, direction, make_inputs, functions, exact, (flops, moved),
        targets,
    )  # fmt: skip


def cases(everything: bool = False, op: str | None = None) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case(op, name, shape, dtype, direction)
        for op in ([op] if op else ("attention", "attention_qkvpacked"))
        for name, shape in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]
