"""linear_gelu (erf) and linear, and the stock Linear."""

from __future__ import annotations

import functools

import torch.nn.functional as F

from .. import ops
from ..ops.linear_gelu import reference
from .subject import Subject, normal


def eager(x, weight, bias, gelu):
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def truth(x, weight, bias, gelu):
    activation = reference.ERF if gelu else reference.IDENTITY
    return reference.linear_gelu(x, weight, bias, activation, x.dtype)[0]


def subject(op, shape, device="cpu") -> Subject:
    """shape: (rows, in_features, out_features)."""
    gelu, (rows, K, N) = op == "linear_gelu", shape

    def ours(backend):
        function = ops.linear_gelu if gelu else ops.linear
        return lambda x, weight, bias: function(x, weight, bias, backend=backend)

    def make(seed, dtype, device="cpu"):
        random = normal(seed, device)
        return [t.to(dtype) for t in (random(rows, K), random(N, K) * 1.4 / K**0.5, random(N) / 2)]

    def cost(size, backward):
        return reference.cost(shape, size, backward=backward, gelu=gelu)

    plain, exact = (functools.partial(function, gelu=gelu) for function in (eager, truth))
    return Subject(op, tuple(shape), make, ours, plain, exact, cost, (K,))
