"""attention and attention_qkvpacked: public functions, backends, schemas, fakes, autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import _checks
from ..._autograd import once_differentiable
from ..._dispatch import (
    Backend,
    autocast_dtype,
    choose,
    declare,
    keep_signature,
    needs_autograd,
    overload,
    without_matrix_unit_at_inference,
)
from .._random import draw_seed
from . import reference

Tensor = torch.Tensor
EVERY_FLOAT = _checks.FLOAT_DTYPES
MAX_HEAD_DIM = 256


def _head_dim_limit(D: int) -> str | None:
    return f"it takes head dims to {MAX_HEAD_DIM}, got {D}" if D > MAX_HEAD_DIM else None


# Order of preference. q, k and v share one dtype; bias has its own.
BACKENDS = (
    Backend("cpu", limit=_head_dim_limit, auto=without_matrix_unit_at_inference),
    Backend("cuda", limit=_head_dim_limit),
    Backend("triton", limit=_head_dim_limit),
    Backend("torch", EVERY_FLOAT),
    Backend("reference", EVERY_FLOAT),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention, self or cross.

    ``out = dropout(softmax(scale * q k^T + bias)) v`` for every batch item and head. A fully masked
    row gives 0.

    Args:
        q: (B, Nq, H, D), fp32, bf16 or fp16 (float64: reference). Any strides.
        k, v: (B, Nk, H, D), dtype of q.
        bias: broadcasts to (B, H, Nq, Nk): float (any float dtype; it may require a gradient; -inf
        masks) or bool
            (True = attend).
        key_padding_mask: bool (B, Nk), True = ignore this key.
        scale: default D ** -0.5.
        dropout_p: probability in [0, 1) of dropping a softmax probability.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        out: (B, Nq, H, D), contiguous, in q's dtype (under torch.autocast: the autocast dtype).

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    q, k, v = _cast(q, k, v)
    scale = check_attention(q, k, v, bias, key_padding_mask, scale, dropout_p)
    bias = bias_4d("attention", bias, q, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    training, dtypes = needs_autograd(q, k, v, bias), (q.dtype,)
    facts = _facts(k.shape[1], q.shape[3], bias)
    chosen = choose("attention", BACKENDS, backend, q.device, dtypes, training=training, **facts)
    seed = draw_seed(q) if dropout_p > 0.0 else None
    args = (q, k, v, bias, key_padding_mask, seed, scale, float(dropout_p))
    if chosen == "torch":
        return _stock_attention(*args)
    if training:
        return _Attention.apply(chosen, *args)[0]
    return overload("attention_fwd", chosen)(*args)[0]


def attention_qkvpacked(
    qkv: Tensor,
    num_heads: int,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Self-attention straight from the output of the qkv Linear to the input of the projection.

    ``q, k, v = qkv`` split as [all q | all k | all v], each head-major; ``out =
    dropout(softmax(scale * q k^T + bias)) v``. Nothing is permuted, made contiguous or stacked,
    forward or backward. A fully masked row gives 0.

    Args:
        qkv: (B, N, 3 * H * D), fp32, bf16 or fp16 (float64: reference). Any strides.
        num_heads: H.
        bias: broadcasts to (B, H, N, N): float (may require a gradient; -inf masks) or bool (True =
        attend). key_padding_mask: bool (B, N), True = ignore this key.
        scale: default D ** -0.5.
        dropout_p: probability in [0, 1) of dropping a softmax probability.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        out: (B, N, H * D), contiguous, in qkv's dtype (under torch.autocast: the autocast dtype).

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: Vaswani et al. 2017; packing of timm's vision_transformer.Attention.
    """
    (qkv,) = _cast(qkv)
    D, scale = _check_packed(qkv, num_heads, key_padding_mask, scale, dropout_p)
    bias = bias_4d(
        "attention_qkvpacked", bias, qkv, (qkv.shape[0], num_heads, qkv.shape[1], qkv.shape[1])
    )
    options = {"training": needs_autograd(qkv, bias), **_facts(qkv.shape[1], D, bias)}
    chosen = choose("attention_qkvpacked", BACKENDS, backend, qkv.device, (qkv.dtype,), **options)
    seed = draw_seed(qkv) if dropout_p > 0.0 else None
    args = (bias, key_padding_mask, seed, scale, float(dropout_p))
    if chosen == "torch":
        return _stock_attention(*reference.unpack(qkv, num_heads), *args).flatten(2)
    if options["training"]:
        return _AttentionQkvPacked.apply(chosen, qkv, num_heads, *args)[0]
    return overload("attention_qkvpacked_fwd", chosen)(qkv, num_heads, *args)[0]


def _facts(Nk, D, bias):
    """What `choose` looks at: the head dim's limit, and the regime."""
    return {"D": D, "sizes": (Nk, D), "variant": "" if bias is None else "bias"}


# --- checks ---------------------------------------------------------------------------------------


def _cast(*tensors):
    """Under autocast the operator computes and returns in the autocast dtype."""
    first = tensors[0]
    dtype = autocast_dtype(first.device) if isinstance(first, torch.Tensor) else None
    if dtype is None:
        return tensors
    wanted = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in wanted else t for t in tensors
    )


def check_attention(q, k, v, bias, key_padding_mask, scale, dropout_p, op="attention"):
    _checks.tensor(op, "q", q, ndim=4, meaning="(B, Nq, H, D)")
    B, Nq, H, D = q.shape
    for name, value in (("k", k), ("v", v)):
        _checks.tensor(op, name, value, like=q, dtypes=(q.dtype,), ndim=4, meaning="(B, Nk, H, D)")
        _checks.tensor(op, name, value, shape=(B, k.shape[1], H, D), meaning="(B, Nk, H, D)")
    if H == 0 or D == 0 or Nq == 0 or k.shape[1] == 0:
        empty = "k" if k.shape[1] == 0 else "q"
        _checks.fail(
            op,
            empty,
            "of shape (B, N, H, D) with N, H, D >= 1",
            _checks.describe(k if empty == "k" else q),
        )
    return _check_options(op, q, (B, k.shape[1]), D, key_padding_mask, scale, dropout_p)


def _check_packed(qkv, num_heads, key_padding_mask, scale, dropout_p):
    op = "attention_qkvpacked"
    _checks.tensor(op, "qkv", qkv, ndim=3, meaning="(B, N, 3 * H * D)")
    _checks.positive_int(op, "num_heads", num_heads)
    B, N, width = qkv.shape
    if N == 0 or width == 0 or width % (3 * num_heads) != 0:
        multiple = f"a multiple of 3 * num_heads = {3 * num_heads}"
        expected = f"of shape (B, N, 3 * H * D) with N >= 1 and the last {multiple}"
        _checks.fail(op, "qkv", expected, _checks.describe(qkv))
    D = width // (3 * num_heads)
    return D, _check_options(op, qkv, (B, N), D, key_padding_mask, scale, dropout_p)


def _check_options(op, like, mask_shape, D, key_padding_mask, scale, dropout_p):
    if key_padding_mask is not None:
        _checks.tensor(
            op,
            "key_padding_mask",
            key_padding_mask,
            like=like,
            dtypes=(torch.bool,),
            shape=mask_shape,
            meaning="(B, Nk)",
        )
    _checks.dropout_p(op, dropout_p)
    if scale is None:
        return float(D) ** -0.5
    _checks.number(
        op, "scale", scale, low=-torch.inf, high=torch.inf, expected="a finite number or None"
    )
    return float(scale)


def bias_4d(op, bias, like, full):
    """The bias as a 4-D view whose every dimension is 1 or full."""
    if bias is None:
        return None
    _checks.tensor(op, "bias", bias, like=like, dtypes=(*EVERY_FLOAT, torch.bool))
    expected = f"broadcastable to (B, H, Nq, Nk) = {tuple(full)}"
    if bias.ndim > 4:
        _checks.fail(op, "bias", expected, _checks.describe(bias))
    if bias.dtype == torch.float64 and like.dtype != torch.float64:
        _checks.fail(
            op,
            "bias",
            "of dtype float32, bfloat16, float16 or bool",
            _checks.describe(bias),
            TypeError,
        )
    for size, wanted in zip(reversed(bias.shape), reversed(full), strict=False):
        if size != 1 and size != wanted:
            _checks.fail(op, "bias", expected, _checks.describe(bias))
    return bias[(None,) * (4 - bias.ndim)]


# --- backend "torch": SDPA where it is exact, visible to autograd and torch.compile ---------------


def _stock_attention(q, k, v, bias, key_padding_mask, seed, scale, dropout_p):
    if (
        dropout_p > 0.0
    ):  # SDPA draws its own mask: the library's mask must be the same on every backend
        out, _ = reference.attention(q, k, v, bias, key_padding_mask, seed, scale, dropout_p)
        return out.contiguous()
    mask = bias
    if bias is not None and bias.dtype != torch.bool:
        mask = bias.to(q.dtype)
    if key_padding_mask is not None:
        attend = ~key_padding_mask[:, None, None, :]
        if mask is None:
            mask = attend
        elif mask.dtype == torch.bool:
            mask = mask & attend
        else:
            mask = mask.masked_fill(~attend, -torch.inf)
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
        )
    return out.transpose(1, 2).contiguous()


# --- raw operators --------------------------------------------------------------------------------


def _lse(x, B, H, N):
    return x.new_empty(
        (B, H, N), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )


def _fake_attention_fwd(q, k, v, bias, key_padding_mask, seed, scale, dropout_p):
    return q.new_empty(q.shape), _lse(q, q.shape[0], q.shape[2], q.shape[1])


def _fake_attention_bwd(
    dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, output_mask
):
    like = (q, k, v, bias)
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip(like, output_mask, strict=True)
    )


def _fake_packed_fwd(qkv, num_heads, bias, key_padding_mask, seed, scale, dropout_p):
    B, N, width = qkv.shape
    return qkv.new_empty((B, N, width // 3)), _lse(qkv, B, num_heads, N)


def _fake_packed_bwd(
    dout, qkv, num_heads, out, lse, bias, key_padding_mask, seed, scale, dropout_p, output_mask
):
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip((qkv, bias), output_mask, strict=True)
    )


_OPTIONS = "Tensor? bias, Tensor? key_padding_mask, Tensor? seed, float scale, float dropout_p"


def _regime(k, bias):
    facts = _facts(k.shape[1], k.shape[3], bias)
    return "attention", facts["sizes"], facts["variant"]


def _packed_regime(qkv, num_heads, bias):
    facts = _facts(qkv.shape[1], qkv.shape[2] // (3 * num_heads), bias)
    return "attention_qkvpacked", facts["sizes"], facts["variant"]


declare(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    fake=_fake_attention_fwd,
    reference=reference.attention_fwd,
    regime=lambda q, k, v, bias, *_: _regime(k, bias),
)
declare(
    "attention_bwd",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS},"
    " bool[] output_mask) -> (Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dbias)",
    fake=_fake_attention_bwd,
    reference=reference.attention_bwd,
    regime=lambda dout, q, k, v, out, lse, bias, *_: _regime(k, bias),
)
declare(
    "attention_qkvpacked_fwd",
    f"(Tensor qkv, int num_heads, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    fake=_fake_packed_fwd,
    reference=reference.attention_qkvpacked_fwd,
    regime=lambda qkv, heads, bias, *_: _packed_regime(qkv, heads, bias),
)
declare(
    "attention_qkvpacked_bwd",
    f"(Tensor dout, Tensor qkv, int num_heads, Tensor out, Tensor lse, {_OPTIONS},"
    " bool[] output_mask) -> (Tensor? dqkv, Tensor? dbias)",
    fake=_fake_packed_bwd,
    reference=reference.attention_qkvpacked_bwd,
    regime=lambda dout, qkv, heads, out, lse, bias, *_: _packed_regime(qkv, heads, bias),
)


# --- autograd -------------------------------------------------------------------------------------


@keep_signature
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("attention_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, q, k, v, bias, key_padding_mask, seed, scale, dropout_p = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, bias, key_padding_mask, seed)
        ctx.backend, ctx.options = backend, (scale, dropout_p)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout, _dlse):
        if dout is None:
            return (None,) * 9
        _, need_q, need_k, need_v, need_bias, *_ = ctx.needs_input_grad
        output_mask = [need_q, need_k, need_v, need_bias]
        dq, dk, dv, dbias = overload("attention_bwd", ctx.backend)(
            dout, *saved, *ctx.options, output_mask
        )
        return None, dq, dk, dv, dbias, None, None, None, None


@keep_signature
class _AttentionQkvPacked(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("attention_qkvpacked_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, qkv, num_heads, bias, key_padding_mask, seed, scale, dropout_p = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, out, lse, bias, key_padding_mask, seed)
        ctx.backend, ctx.num_heads, ctx.options = backend, num_heads, (scale, dropout_p)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout, _dlse):
        if dout is None:
            return (None,) * 8
        qkv, *saved = saved
        _, need_qkv, _, need_bias, *_ = ctx.needs_input_grad
        dqkv, dbias = overload("attention_qkvpacked_bwd", ctx.backend)(
            dout, qkv, ctx.num_heads, *saved, *ctx.options, [need_qkv, need_bias]
        )
        return None, dqkv, None, dbias, None, None, None, None
