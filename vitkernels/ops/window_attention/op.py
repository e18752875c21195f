"""window_attention: public function, backends, schemas, fakes, autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import _checks
from ..._autograd import once_differentiable
from ..._dispatch import (
    Backend,
    choose,
    computed_dtype,
    declare,
    keep_signature,
    needs_autograd,
    overload,
)
from .._random import draw_seed
from . import reference

Tensor = torch.Tensor
EVERY_FLOAT = _checks.FLOAT_DTYPES
MAX_HEAD_DIM = 128
MAX_TOKENS = 1024  # of a window


def _size_limit(D: int, N: int) -> str | None:
    if D > MAX_HEAD_DIM:
        return f"it takes head dims to {MAX_HEAD_DIM}, got {D}"
    return f"it takes windows to {MAX_TOKENS} tokens, got {N}" if N > MAX_TOKENS else None


# Order of preference. qkv, bias_table and logit_scale each have their own dtype.
BACKENDS = (
    Backend("cpu", limit=_size_limit),
    Backend("cuda", limit=_size_limit),
    Backend("triton", limit=_size_limit),
    Backend("torch", EVERY_FLOAT),
    Backend("reference", EVERY_FLOAT),
)


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = 0,
    num_heads: int,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention inside shifted windows, from the output of the qkv Linear to the input of the
    projection: Swin's roll, partition, position bias, mask, softmax, reverse and roll in one pass.

    ``out = dropout(softmax(scale * q k^T + bias)) v`` in every window of the map rolled by
    -shift_size, rolled back. ``bias[h, i, j] = bias_table[(yi - yj + Wh - 1) * (2 Ww - 1) + xi - xj
    + Ww - 1, h]`` for tokens at (y, x) of the window; tokens that the roll brings together from
    opposite edges of the map do not attend to each other. With logit_scale (Swin V2) the product is
    ``exp(min(logit_scale, ln 100)) * cos(q, k)``.

    Args:
        qkv: (B, H, W, 3 * C), channels [all q | all k | all v], each head-major; fp32, bf16, fp16
        (float64: reference). Any strides. H and W are multiples of the window.
        bias_table: ((2 Wh - 1) * (2 Ww - 1), num_heads); it may stay fp32. Of Swin V2: 16 *
        sigmoid(MLP(relative coordinates)).
        window_size: (Wh, Ww), or one int for both.
        shift_size: (rows, columns), or one int for both; 0 <= shift < window.
        num_heads: heads; head dim D = C / num_heads.
        scale: default D ** -0.5; not with logit_scale.
        logit_scale: (num_heads,) or (num_heads, 1, 1), natural logarithm of the factor on the
        cosines; it may stay fp32.
        dropout_p: probability in [0, 1) of dropping a softmax probability.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        out: (B, H, W, C), contiguous, in qkv's dtype (under torch.autocast: the autocast dtype).

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: Liu et al. 2021, section 3.2 (Swin); Liu et al. 2022, section 3.3 (Swin V2).
    """
    window, shift = _pair("window_size", window_size, 1), _pair("shift_size", shift_size, 0)
    scale = _check(qkv, bias_table, window, shift, num_heads, scale, logit_scale, dropout_p)
    qkv = _cast(qkv)
    dtypes = tuple(t.dtype for t in (qkv, bias_table, logit_scale) if t is not None)
    training = needs_autograd(qkv, bias_table, logit_scale)
    facts = _facts(qkv, window, num_heads, logit_scale) | {"training": training}
    chosen = choose("window_attention", BACKENDS, backend, qkv.device, dtypes, **facts)
    seed = draw_seed(qkv) if dropout_p > 0.0 else None
    options = (*window, *shift, num_heads, scale, float(dropout_p))
    args = (qkv, bias_table, logit_scale, seed, *options)
    if chosen == "torch":
        return _stock(*args)
    if training:
        return _WindowAttention.apply(chosen, *args)[0]
    return overload("window_attention_fwd", chosen)(*args)[0]


def _facts(qkv, window, num_heads, logit_scale):
    """What `choose` looks at: the limits, and the regime."""
    N, D = window[0] * window[1], qkv.shape[3] // (3 * num_heads)
    return {"N": N, "D": D, "sizes": (N, D), "variant": "" if logit_scale is None else "cosine"}


# --- checks ---------------------------------------------------------------------------------------


def _cast(qkv):
    """Under autocast the operator computes and returns in the autocast dtype."""
    return qkv.to(computed_dtype(qkv.dtype, qkv.device))


def _pair(arg, value, low):
    """(rows, columns) of an int or a pair, each at least `low`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    integers = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not integers:
        expected = "an integer or a pair of integers"
        _checks.fail("window_attention", arg, expected, _checks.describe(value), TypeError)
    if min(values) < low:
        _checks.fail("window_attention", arg, f"at least {low}", value)
    return values


def _check(qkv, bias_table, window, shift, num_heads, scale, logit_scale, dropout_p):
    op = "window_attention"
    _checks.tensor(op, "qkv", qkv, ndim=4, meaning="(B, H, W, 3 * C)")
    _checks.positive_int(op, "num_heads", num_heads)
    _, H, W, width = qkv.shape
    if width == 0 or width % (3 * num_heads) != 0:
        expected = (
            f"of shape (B, H, W, 3 * C) with 3 * C a multiple of 3 * num_heads = {3 * num_heads}"
        )
        _checks.fail(op, "qkv", expected, _checks.describe(qkv))
    (Wh, Ww) = window
    if H == 0 or W == 0 or H % Wh != 0 or W % Ww != 0:
        expected = f"of shape (B, H, W, 3 * C) with H and W multiples of window_size = {window}"
        _checks.fail(op, "qkv", expected, _checks.describe(qkv))
    if shift[0] >= Wh or shift[1] >= Ww:
        _checks.fail(op, "shift_size", f"less than window_size = {window}", shift)
    table = ((2 * Wh - 1) * (2 * Ww - 1), num_heads)
    meaning = "((2 Wh - 1)(2 Ww - 1), num_heads)"
    _checks.tensor(op, "bias_table", bias_table, like=qkv, shape=table, meaning=meaning)
    _checks.dropout_p(op, dropout_p)
    if logit_scale is not None:
        if scale is not None:
            _checks.fail(op, "scale", "None beside logit_scale", scale)
        _checks.tensor(op, "logit_scale", logit_scale, like=qkv)
        if logit_scale.shape not in ((num_heads,), (num_heads, 1, 1)):
            expected = f"of shape ({num_heads},) or ({num_heads}, 1, 1)"
            _checks.fail(op, "logit_scale", expected, _checks.describe(logit_scale))
    if scale is None:
        return float(width // (3 * num_heads)) ** -0.5
    anything = {"low": -torch.inf, "high": torch.inf, "expected": "a finite number or None"}
    _checks.number(op, "scale", scale, **anything)
    return float(scale)


# --- backend "torch": stock operators, visible to autograd and torch.compile ----------------------


def _stock(
    qkv, bias_table, logit_scale, seed, Wh, Ww, shift_h, shift_w, num_heads, scale, dropout_p
):
    window, shift = (Wh, Ww), (shift_h, shift_w)
    if dropout_p > 0.0:  # SDPA draws its own mask: it must be the same on every backend
        out, _ = reference.window_attention(
            qkv, bias_table, window, shift, num_heads, scale, logit_scale, seed, dropout_p
        )
        return out.contiguous()
    with torch.autocast(qkv.device.type, enabled=False):
        x = reference.to_windows(qkv, window, shift).unflatten(-1, (3, num_heads, -1))
        q, k, v = x.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, windows, heads, N, D)
        if logit_scale is not None:
            factor = reference.factor(logit_scale, reference.widen(logit_scale))
            # In fp32: fp16 has no 1e-12, and the zero vector of a padded token would be NaN.
            q, k = (reference.unit(reference.widen(t)).to(t.dtype) for t in (q, k))
            q, scale = q * factor.to(q.dtype), 1.0
        bias = reference.position_bias(bias_table, window).to(q.dtype)
        apart = reference.seams(qkv.shape, window, shift, qkv.device)
        if apart is not None:
            bias = bias.masked_fill(apart[:, None], -torch.inf)  # (windows, heads, N, N)
        out = _attend(q, k, v, bias, scale)
        out = out.transpose(2, 3).flatten(3)
        return reference.from_windows(out, qkv.shape[1:3], window, shift).contiguous()


def _attend(q, k, v, bias, scale):
    """The formula for small windows on a CPU, where it beats SDPA with a mask; else SDPA, with
    windows as heads so that the mask has no batch."""
    B, windows, heads, N, _ = q.shape
    if q.device.type == "cpu" and N <= 100:
        return ((q * scale) @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    mask = bias.expand(windows, heads, N, N).reshape(1, windows * heads, N, N)
    q, k, v = (t.flatten(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.unflatten(1, (windows, heads))


# --- raw operators --------------------------------------------------------------------------------


def _fake_window_attention_fwd(
    qkv, bias_table, logit_scale, seed, Wh, Ww, shift_h, shift_w, num_heads, scale, dropout_p
):
    B, H, W, width = qkv.shape
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    lse = qkv.new_empty((B, (H // Wh) * (W // Ww), num_heads, Wh * Ww), dtype=dtype)
    return qkv.new_empty((B, H, W, width // 3)), lse


def _fake_window_attention_bwd(
    dout, qkv, out, lse, bias_table, logit_scale, seed,
    Wh, Ww, shift_h, shift_w, num_heads, scale, dropout_p, output_mask,
):  # fmt: skip
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip((qkv, bias_table, logit_scale), output_mask, strict=True)
    )


def _regime(qkv, logit_scale, Wh, Ww, num_heads):
    facts = _facts(qkv, (Wh, Ww), num_heads, logit_scale)
    return "window_attention", facts["sizes"], facts["variant"]


_OPTIONS = (
    "Tensor bias_table, Tensor? logit_scale, Tensor? seed, int window_h, int window_w,"
    " int shift_h, int shift_w, int num_heads, float scale, float dropout_p"
)

declare(
    "window_attention_fwd",
    f"(Tensor qkv, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    fake=_fake_window_attention_fwd,
    reference=reference.window_attention_fwd,
    regime=lambda qkv, table, logit_scale, seed, Wh, Ww, sh, sw, heads, *_: _regime(
        qkv, logit_scale, Wh, Ww, heads
    ),
)
declare(
    "window_attention_bwd",
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}, bool[] output_mask)"
    " -> (Tensor? dqkv, Tensor? dbias_table, Tensor? dlogit_scale)",
    fake=_fake_window_attention_bwd,
    reference=reference.window_attention_bwd,
    regime=lambda dout, qkv, out, lse, table, logit_scale, seed, Wh, Ww, sh, sw, heads, *_: _regime(
        qkv, logit_scale, Wh, Ww, heads
    ),
)


# --- autograd -------------------------------------------------------------------------------------


@keep_signature
class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("window_attention_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, qkv, bias_table, logit_scale, seed, *options = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, out, lse, bias_table, logit_scale, seed)
        ctx.backend, ctx.options = backend, options

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout, _dlse):
        if dout is None:
            return (None,) * 12
        output_mask = list(ctx.needs_input_grad[1:4])
        grads = overload("window_attention_bwd", ctx.backend)(
            dout, *saved, *ctx.options, output_mask
        )
        return None, *grads, *(None,) * 8
