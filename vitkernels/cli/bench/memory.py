"""The most memory that a call holds beyond what was held before it, and attention's part of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
METHODS = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "growth of the resident memory to its peak (VmHWM), from after malloc_trim",
    "none": "not measured: /proc/self/clear_refs is not there",
}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """GPU: torch's allocator. CPU: the kernel's own high-water mark of resident memory.

    What earlier calls freed but malloc kept would hide the growth, so it is given back first; what
    a library keeps from its first call (oneDNN's scratch memory) is held before and not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    _give_back()
    try:
        _CLEAR.write_text("5")  # the high-water mark starts again from here
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def method(device: torch.device) -> str:
    return METHODS["none" if device.type == "cpu" and not _CLEAR.exists() else device.type]


# --- what attention keeps -------------------------------------------------------------------------


def saved_by_attention(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that the modules called `attn` keep from the forward for the backward, in a call of the
    model with gradients: inputs of their products, probabilities, statistics.

    A tensor that several operations keep counts once; parameters and their casts do not.
    """
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    weights |= {shape[::-1] for shape in weights}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # by address; they stay alive, so that no address comes twice
    inside = False

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if inside and address not in parameters and tuple(tensor.shape) not in weights:
            kept[address] = tensor
        return tensor

    def enter(*_) -> None:
        nonlocal inside
        inside = True

    def leave(*_) -> None:
        nonlocal inside
        inside = False

    handles = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "attn":
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _give_back() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
