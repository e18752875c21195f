"""Problems of attention and attention_qkvpacked, and the plain PyTorch they are measured by."""

from __future__ import annotations

import torch
from problems import Problem, lowest_precision

from vitkernels.ops._random import keep_mask
from vitkernels.ops.attention import reference


def attention_problem(
    B,
    N,
    H,
    D,
    dtype=torch.float32,
    *,
    Nk=None,
    bias=None,
    bias_dtype=None,
    bool_bias=None,
    key_padding_mask=None,
    scale=None,
    dropout_p=0.0,
    magnitude=1.0,
    seed=5,
) -> Problem:
    """bias and bool_bias are shapes; bool_bias and key_padding_mask may also be tensors."""
    make = _Maker(seed)
    Nk = N if Nk is None else Nk
    inputs = {
        "q": (magnitude * make.normal((B, N, H, D))).to(dtype),
        "k": make.normal((B, Nk, H, D)).to(dtype),
        "v": make.normal((B, Nk, H, D)).to(dtype),
    }
    options = {"scale": scale, "dropout_p": dropout_p}
    _add_masks(make, inputs, options, bias, bias_dtype or dtype, bool_bias, key_padding_mask)
    return Problem(
        "attention",
        inputs,
        options,
        spec_attention,
        eager_attention,
        ("out",),
        (tuple(inputs),),
        lowest_precision(dtype, bias_dtype),
        seed,
    )


def packed_problem(
    B,
    N,
    H,
    D,
    dtype=torch.float32,
    *,
    bias=None,
    bias_dtype=None,
    bool_bias=None,
    key_padding_mask=None,
    scale=None,
    dropout_p=0.0,
    seed=5,
) -> Problem:
    make = _Maker(seed)
    inputs = {"qkv": make.normal((B, N, 3 * H * D)).to(dtype)}
    options = {"num_heads": H, "scale": scale, "dropout_p": dropout_p}
    _add_masks(make, inputs, options, bias, bias_dtype or dtype, bool_bias, key_padding_mask)
    return Problem(
        "attention_qkvpacked",
        inputs,
        options,
        _packed(spec_attention),
        _packed(eager_attention),
        ("out",),
        (tuple(inputs),),
        lowest_precision(dtype, bias_dtype),
        seed,
    )


def _add_masks(make, inputs, options, bias, bias_dtype, bool_bias, key_padding_mask):
    if bias is not None:
        inputs["bias"] = make.normal(bias).to(bias_dtype)
    if bool_bias is not None:
        given = isinstance(bool_bias, torch.Tensor)
        options["bias"] = bool_bias if given else make.normal(bool_bias) > -0.7
    if key_padding_mask is not None:
        given = isinstance(key_padding_mask, torch.Tensor)
        options["key_padding_mask"] = (
            key_padding_mask if given else make.normal(key_padding_mask) > 0.7
        )


class _Maker:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator)


def _packed(function):
    """attention on the three parts of qkv."""

    def call(*, qkv, num_heads, **others):
        q, k, v = reference.unpack(qkv, num_heads)
        return function(q=q, k=k, v=v, **others).flatten(2)

    return call


def spec_attention(*, q, k, v, bias=None, key_padding_mask=None, scale, dropout_p, seed):
    """The truth: the specification, differentiated by autograd."""
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention(q, k, v, bias, key_padding_mask, seed, scale, dropout_p)[0]


def eager_attention(*, q, k, v, bias=None, key_padding_mask=None, scale, dropout_p, seed):
    """The yardstick: timm's unfused attention, every step in the tested dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.transpose(1, 2) * scale) @ k.permute(0, 2, 3, 1)
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -torch.inf)
    masked = (scores == -torch.inf).all(-1, keepdim=True)
    p = scores.masked_fill(masked, 0.0).softmax(-1).masked_fill(masked, 0.0)
    if dropout_p > 0:
        p = p * keep_mask(seed, tuple(p.shape), dropout_p) / (1 - dropout_p)
    return (p @ v.transpose(1, 2)).transpose(1, 2)
