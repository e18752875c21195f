"""First derivatives only, and a second one refused however it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

Tensor = torch.Tensor


def once_differentiable(backward: Callable) -> Callable:
    """Decorates `backward(ctx, saved, *grads)` of an autograd.Function, saved: ctx.saved_tensors.

    torch's decorator of this name looks at the incoming gradients alone: the gradient of y.sum() is
    a constant to it, so that a gradient penalty adds nothing to .grad, and so is all that
    torch.func.grad differentiates a second time. Here whatever a gradient was made of leads to the
    refusal.
    """

    @functools.wraps(backward)
    def call(ctx, *grads):
        saved = ctx.saved_tensors  # once: a checkpoint recomputes at each look
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            found = backward(ctx, saved, *grads)
        origins = [t for t in (*grads, *saved) if t is not None]
        return tuple(None if t is None else _Refusal.apply(t, *origins) for t in found)

    return call


class _Refusal(torch.autograd.Function):
    """found, whose own gradient is refused."""

    @staticmethod
    def forward(found: Tensor, *origins: Tensor) -> Tensor:
        return found.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "vitkernels: its operators are once_differentiable, second derivatives are not "
            "implemented: backend='torch' has those of stock PyTorch"
        )
