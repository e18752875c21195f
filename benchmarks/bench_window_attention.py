"""window_attention from packed qkv to packed output, beside timm's eager way, SDPA with the mask,
and torch.compile of each.

The peers roll, partition, reverse and roll back; their index, bias gather and mask are built once,
as a model builds them. SwinV2's shapes come with cosines. What a training step keeps for the
backward: `python -m benchmarks.bench_window_attention`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from vitkernels.ops import window_attention
from vitkernels.ops.window_attention import reference

from .harness import BOTH, FORWARD, Case, problem_of
from .shapes import DTYPES, WINDOW_ATTENTION_TARGETS

LN_100 = reference.MAX_LOGIT_SCALE


class Peer:
    """timm's WindowAttention between its two Linears; `attend` is the part in the middle."""

    def __init__(self, attend, shape, window, shift):
        _, H, W, self.heads, self.D = shape
        self.attend, self.window, self.shift = attend, window, shift
        self.index = reference.position_index((window, window)).flatten()
        self.mask = None
        if shift:
            apart = reference.seams((1, H, W), (window, window), (shift, shift))
            self.mask = torch.zeros(apart.shape).masked_fill(apart, -100.0)  # as timm has it

    def __call__(self, qkv, table, logit_scale=None):
        (B, H, W, _), w = qkv.shape, self.window
        if self.shift:
            qkv = torch.roll(qkv, (-self.shift, -self.shift), (1, 2))
        x = qkv.view(B, H // w, w, W // w, w, -1).transpose(2, 3).reshape(-1, w * w, qkv.shape[-1])
        q, k, v = x.unflatten(-1, (3, self.heads, self.D)).permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.D**-0.5
        if logit_scale is not None:
            factor = logit_scale.clamp(max=LN_100).exp()[:, None, None].to(q.dtype)
            q, k, scale = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), 1.0
        bias = table[self.index].view(w * w, w * w, -1).permute(2, 0, 1).unsqueeze(0).to(q.dtype)
        x = self.attend(q, k, v, bias, None if self.mask is None else self.mask.to(q.dtype), scale)
        x = x.transpose(1, 2).reshape(B, H // w, W // w, w, w, -1).transpose(2, 3)
        x = x.reshape(B, H, W, -1)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


def eager(q, k, v, bias, mask, scale):
    """timm without SDPA, its default for Swin."""
    scores = (q * scale) @ k.transpose(-2, -1) + bias
    if mask is not None:
        windows = mask.shape[0]
        scores = (scores.unflatten(0, (-1, windows)) + mask[:, None]).flatten(0, 1)
    return scores.softmax(-1) @ v


def sdpa(q, k, v, bias, mask, scale):
    """timm with SDPA, but for the mask, which is not repeated for every sample: windows are heads
    of a batch of samples, and the mask is broadcast over them."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    windows = mask.shape[0]
    together = (bias + mask[:, None]).flatten(0, 1)[None]  # (1, windows * heads, N, N)
    q, k, v = (t.unflatten(0, (-1, windows)).flatten(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=together, scale=scale)
    return out.unflatten(1, (windows, -1)).flatten(0, 1)


def ours(qkv, table, logit_scale=None, *, window, shift, heads):
    options = {"window_size": window, "shift_size": shift, "num_heads": heads}
    return window_attention(qkv, table, logit_scale=logit_scale, **options)


def truth(qkv, table, logit_scale=None, *, window, shift, heads, scale):
    sizes = ((window, window), (shift, shift), heads, scale)
    return reference.window_attention(qkv, table, *sizes, logit_scale, None, 0.0)[0]


def make_inputs(shape, window, cosine, dtype, seed):
    B, H, W, heads, D = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn((B, H, W, 3 * heads * D), generator=generator).to(dtype)
    inputs = [qkv, torch.randn(((2 * window - 1) ** 2, heads), generator=generator)]
    return [*inputs, torch.full((heads,), 10.0).log()] if cosine else inputs


def case(name, shape, window, shift, dtype, direction) -> Case:
    cosine = name.startswith("swinv2")
    flops, moved = reference.cost(shape, window, dtype.itemsize)
    if direction == BOTH:
        more_flops, more = reference.cost(shape, window, dtype.itemsize, backward=True)
        flops, moved = flops + more_flops, moved + more
    sizes = {"window": window, "shift": shift, "heads": shape[3]}
    return Case(
        "window_attention",
        name,
        tuple(shape),
        dtype,
        direction,
        lambda seed: make_inputs(shape, window, cosine, dtype, seed),
        {
            "vitkernels": functools.partial(ours, **sizes),
            "eager": Peer(eager, shape, window, shift),
            "SDPA": Peer(sdpa, shape, window, shift),
        },
        functools.partial(truth, **sizes, scale=shape[4] ** -0.5),
        (flops, moved),
        WINDOW_ATTENTION_TARGETS.get((name, dtype, direction), {}),
    )


def cases(everything: bool = False) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case(name, shape, window, shift, dtype, direction)
        for name, shape, window, shift in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]


# ---- Memory


def kept_bytes(case: Case, name: str) -> int:
    """What the forward of one function keeps for the backward, its inputs left out."""
    inputs, _ = problem_of(case)
    kept = {}
    given = {t.untyped_storage().data_ptr() for t in inputs}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.functions[name](*inputs)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in given)


def main() -> None:
    for each in (c for c in cases(everything=True) if c.direction == BOTH):
        sizes = {name: kept_bytes(each, name) / 2**20 for name in each.functions}
        text = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items())
        print(f"{each.title}: MiB kept for the backward: {text}")


if __name__ == "__main__":
    main()
