"""window_attention from packed qkv to packed output, and what timm does between its two Linears."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import ops
from ..ops.window_attention import reference
from .subject import Subject, normal

LN_100 = reference.MAX_LOGIT_SCALE


class Peer:
    """timm's WindowAttention between its two Linears; `attend` is the part in the middle.

    It rolls, partitions, reverses and rolls back; index and mask are built once, as a model does.
    """

    def __init__(self, attend, shape, window, shift, device="cpu"):
        _, H, W, self.heads, self.D = shape
        self.attend, self.window, self.shift = attend, window, shift
        self.index = reference.position_index((window, window)).flatten().to(device)
        self.mask = None
        if shift:
            apart = reference.seams((1, H, W), (window, window), (shift, shift)).to(device)
            zeros = torch.zeros(apart.shape, device=device)
            self.mask = zeros.masked_fill(apart, -100.0)  # as timm has it

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


def subject(op, shape, device="cpu", *, window, shift=0, cosine=False) -> Subject:
    """shape: (B, H, W, heads, D); cosine: Swin V2's logit_scale, ln 10 for every head."""
    B, H, W, heads, D = shape
    sizes = {"window_size": window, "shift_size": shift, "num_heads": heads}

    def ours(backend):
        def call(qkv, table, logit_scale=None):
            return ops.window_attention(
                qkv, table, logit_scale=logit_scale, **sizes, backend=backend
            )

        return call

    def truth(qkv, table, logit_scale=None):
        raw = ((window, window), (shift, shift), heads, D**-0.5)
        return reference.window_attention(qkv, table, *raw, logit_scale, None, 0.0)[0]

    def make(seed, dtype, device="cpu"):
        random = normal(seed, device)
        inputs = [random(B, H, W, 3 * heads * D).to(dtype), random((2 * window - 1) ** 2, heads)]
        return [*inputs, torch.full((heads,), 10.0, device=device).log()] if cosine else inputs

    def cost(size, backward):
        return reference.cost(shape, window, size, backward=backward)

    return Subject(
        op,
        tuple(shape),
        make,
        ours,
        Peer(eager, shape, window, shift, device),
        truth,
        cost,
        (window * window, D),
        "cosine" if cosine else "",
        {"SDPA": Peer(sdpa, shape, window, shift, device)},
    )
