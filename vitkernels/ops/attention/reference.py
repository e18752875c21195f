"""The specification of attention: plain PyTorch, obvious, correct in float64.

Corner cases that every backend follows: a fully masked row gives output 0, log-sum-exp -inf and no
gradient; -inf in a float bias masks like False in a bool bias; a NaN score makes its whole row NaN;
dropout acts on the probabilities.
"""

from __future__ import annotations

import torch

from .._random import keep_mask

Tensor = torch.Tensor


def attention(q, k, v, bias, key_padding_mask, seed, scale, dropout_p):
    """softmax(scale * q k^T + bias) v; q (B,Nq,H,D), k, v (B,Nk,H,D). Returns out and lse."""
    p, lse = probabilities(scores(q, k, bias, key_padding_mask, scale))
    out = torch.einsum("bhij,bjhd->bihd", dropout(p, seed, dropout_p), widen(v))
    return out.to(q.dtype), lse


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def scores(q, k, bias, key_padding_mask, scale):
    s = torch.einsum("bihd,bjhd->bhij", widen(q), widen(k)) * scale
    if bias is not None:
        s = s.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else s + bias
    if key_padding_mask is not None:
        s = s.masked_fill(key_padding_mask[:, None, None, :], -torch.inf)
    return s


def probabilities(s):
    """Softmax rows and their log-sum-exp; a row of only -inf gives probabilities 0."""
    masked = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(masked, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    p = softmax(s, lse).masked_fill(masked, 0.0)
    return p, lse.masked_fill(masked, -torch.inf).squeeze(-1)


def softmax(s, lse):
    """Not exp(s - lse), but for the NaN of an infinite score in its own place only: beside scores
    of -1e9, as masks have them, a log-sum-exp has no digits for log(Nk)."""
    return torch.where(lse == torch.inf, torch.exp(s - lse), torch.softmax(s, -1))


def dropout(p, seed, dropout_p):
    if dropout_p == 0.0:
        return p
    return p * (keep_mask(seed, tuple(p.shape), dropout_p).to(p.dtype) / (1.0 - dropout_p))


def attention_weights(q, k, bias, scale, rows):
    """The softmax rows `rows` (an index tensor) of every head, (B,H,rows,Nk)."""
    if bias is not None and bias.shape[2] != 1:
        bias = bias[:, :, rows]
    return probabilities(scores(q[:, rows], k, bias, None, scale))[0]


# --- raw operators --------------------------------------------------------------------------------


def attention_fwd(q, k, v, bias, key_padding_mask, seed, scale, dropout_p):
    out, lse = attention(q, k, v, bias, key_padding_mask, seed, scale, dropout_p)
    return out.contiguous(), lse.contiguous()


def attention_bwd(
    dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, output_mask
):
    s = scores(q, k, bias, key_padding_mask, scale)
    p, _ = probabilities(s)
    dout, wide_q, wide_k = widen(dout), widen(q), widen(k)
    dp = dropout(torch.einsum("bihd,bjhd->bhij", dout, widen(v)), seed, dropout_p)
    # rowsum(p * dp) equals rowsum(dout * out); masked entries have p = 0 and get no gradient,
    # whatever dp holds.
    ds = torch.where(s == -torch.inf, 0.0, p * (dp - (p * dp).sum(-1, keepdim=True)))
    dq = torch.einsum("bhij,bjhd->bihd", ds, wide_k) * scale
    dk = torch.einsum("bhij,bihd->bjhd", ds, wide_q) * scale
    dv = torch.einsum("bhij,bihd->bjhd", dropout(p, seed, dropout_p), dout)
    return (
        dq.to(q.dtype).contiguous() if output_mask[0] else None,
        dk.to(q.dtype).contiguous() if output_mask[1] else None,
        dv.to(q.dtype).contiguous() if output_mask[2] else None,
        ds.sum_to_size(bias.shape).to(bias.dtype).contiguous() if output_mask[3] else None,
    )


def unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three (B,N,H,D) views of the Linear output (B,N,3HD) = [all q | all k | all v]."""
    B, N, width = qkv.shape
    return qkv.unflatten(2, (3, num_heads, width // (3 * num_heads))).unbind(2)


def attention_qkvpacked_fwd(qkv, num_heads, bias, key_padding_mask, seed, scale, dropout_p):
    out, lse = attention_fwd(
        *unpack(qkv, num_heads), bias, key_padding_mask, seed, scale, dropout_p
    )
    return out.flatten(2), lse


def attention_qkvpacked_bwd(
    dout, qkv, num_heads, out, lse, bias, key_padding_mask, seed, scale, dropout_p, output_mask
):
    q, k, v = unpack(qkv, num_heads)
    need_dqkv, need_dbias = output_mask
    mask = [need_dqkv, need_dqkv, need_dqkv, need_dbias]
    dout, out = dout.unflatten(2, q.shape[2:]), out.unflatten(2, q.shape[2:])
    dq, dk, dv, dbias = attention_bwd(
        dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, mask
    )
    return torch.stack((dq, dk, dv), 2).flatten(2) if need_dqkv else None, dbias


# --- what tests, benchmarks and profilers share ---------------------------------------------------


def sample_inputs():
    """(name, (B, N, H, D)) of the calls people meet."""
    return [
        ("vit_tiny_224", (4, 197, 3, 64)),
        ("vit_small_224", (4, 197, 6, 64)),
        ("vit_base_224", (2, 197, 12, 64)),
        ("vit_huge_14_224", (1, 257, 16, 80)),
        ("vit_base_384", (1, 577, 12, 64)),
        ("deit_tiny_50", (8, 50, 3, 64)),
        ("dinov2_small_518", (1, 1370, 6, 64)),
    ]


def cost(shape, itemsize=2, *, Nk=None, backward=False, bias_bytes=0):
    """(FLOPs, least bytes): two products forward, five backward; each tensor moved once."""
    B, N, H, D = shape
    Nk = N if Nk is None else Nk
    products, tensors = (5, 4) if backward else (2, 2)
    flops = 2 * products * B * H * N * Nk * D
    return flops, B * H * D * itemsize * tensors * (N + Nk) + bias_bytes * (2 if backward else 1)
