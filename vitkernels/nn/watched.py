"""Who watches a module: what decides whether several modules may run as one operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def untouched(module: nn.Module, *classes: type) -> bool:
    """Whether this is exactly one of these classes and nobody hooks into it."""
    return type(module) in classes and not hooked(module)


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # replaced on this very module
    )


def keeps(module: nn.Module, base: type, *methods: str) -> bool:
    """Whether these methods are base's: no subclass has its own, nobody replaced one on this very
    module."""
    return all(
        getattr(type(module), name) is getattr(base, name) and name not in module.__dict__
        for name in methods
    )


def global_hooks() -> bool:
    return torch.nn.modules.module._has_any_global_hook()


def plain(*tensors: Tensor | None) -> bool:
    """Whether none of these is a DTensor, a quantized tensor or another that brings its own ops."""
    return not any(t is not None and is_traceable_wrapper_subclass(t) for t in tensors)


def own_part(tensor):
    """What this process holds of a DTensor, with gradients; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
