"""The specification of linear_gelu and linear: plain PyTorch, obvious, correct in float64.

Corner cases that every backend follows: GELU of -Inf is NaN (-Inf * 0), as in PyTorch; the
backward takes the derivative at the pre-activation as it is stored, saved or recomputed alike.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

# The raw operators' `activation`; IDENTITY is the plain Linear.
IDENTITY, ERF, TANH, QUICK = range(4)
ACTIVATIONS = {"none": ERF, "tanh": TANH, "quick": QUICK}  # by the public name of `approximate`


def linear_gelu(x, weight, bias, activation, out_dtype):
    """h = x W^T + bias from operands rounded to out_dtype; y = GELU(h). Returns y, h, both wide."""
    x, weight = (widen(t.to(out_dtype)) for t in (x, weight))
    h = x @ weight.T
    h = h if bias is None else h + bias.to(h.dtype)
    return activate(h, activation), h


def activate(h: Tensor, activation: int) -> Tensor:
    if activation == IDENTITY:
        return h
    if activation == QUICK:
        return h * torch.sigmoid(1.702 * h)
    return F.gelu(h, approximate="tanh" if activation == TANH else "none")


def derivative(h: Tensor, activation: int) -> Tensor:
    """dy/dh."""
    if activation == IDENTITY:
        return torch.ones_like(h)
    if activation == QUICK:
        gate = torch.sigmoid(1.702 * h)
        return gate + 1.702 * h * gate * (1 - gate)
    if activation == TANH:
        root = math.sqrt(2 / math.pi)
        t = torch.tanh(root * (h + 0.044715 * h**3))
        return 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * root * (1 + 3 * 0.044715 * h * h)
    density = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-h / math.sqrt(2)) + h * density


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- raw operators --------------------------------------------------------------------------------


def linear_gelu_fwd(x, weight, bias, activation, save_preactivation, out_dtype):
    y, h = linear_gelu(x, weight, bias, activation, out_dtype)
    keep = save_preactivation and activation != IDENTITY
    return y.to(out_dtype).contiguous(), h.to(out_dtype).contiguous() if keep else None


def linear_gelu_bwd(dy, x, weight, bias, preactivation, activation, output_mask):
    # dh = dy * act'(h), rounded once to the dtype of the products, which is dy's.
    dh = widen(dy)
    if activation != IDENTITY:
        if preactivation is None:
            preactivation = linear_gelu(x, weight, bias, activation, dy.dtype)[1].to(dy.dtype)
        dh = dh * derivative(widen(preactivation), activation)
    dh = widen(dh.to(dy.dtype))
    rows = dh.reshape(-1, dh.shape[-1])
    dx = dweight = dbias = None
    if output_mask[0]:
        dx = (dh @ widen(weight.to(dy.dtype))).to(x.dtype).contiguous()
    if output_mask[1]:
        inputs = widen(x.to(dy.dtype)).reshape(-1, x.shape[-1])
        dweight = (rows.T @ inputs).to(weight.dtype)
    if output_mask[2]:
        dbias = rows.sum(0).to(bias.dtype)
    return dx, dweight, dbias


# --- what tests, benchmarks and profilers share ---------------------------------------------------


def sample_inputs():
    """(name, (rows, in_features, out_features)) people meet: the first Linear of an MLP."""
    return [
        ("vit_tiny", (8 * 197, 192, 768)),
        ("vit_small", (8 * 197, 384, 1536)),
        ("vit_base", (8 * 197, 768, 3072)),
        ("vit_large", (4 * 197, 1024, 4096)),
        ("swin_tiny_stage1", (2 * 3136, 96, 384)),
        ("batch_1", (197, 384, 1536)),
    ]


def cost(shape, item_bytes=2, *, backward=False, gelu=True):
    """(FLOPs, least bytes) of one call: x, weight read, y (and the pre-activation) written once."""
    rows, K, N = shape
    products = 2 * rows * K * N
    x, weight, y = rows * K, K * N, rows * N
    if not backward:
        return products, (x + weight + y) * item_bytes
    return 2 * products, (2 * x + 2 * weight + (2 if gelu else 1) * y) * item_bytes
