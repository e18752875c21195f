"""Host side of a launch: device, machine size, and the rows of an arbitrarily strided tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NoReturn

import torch
import triton

# True when kernels run on the CPU, one program after the other (TRITON_INTERPRET=1).
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fail(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"vitkernels::{op}: {name} must be {expected}, got {got}")


def check_like(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """Refuses another shape or dtype; None passes.

    Raw operators are called without the public functions' checks too, by exported graphs.
    """
    if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        fail(op, name, f"of shape {tuple(shape)} and dtype {names}", got)


def check_wanted(
    op: str, output_mask: Sequence[bool], inputs: dict[str, torch.Tensor | None]
) -> None:
    """Refuses a mask of another length, and a gradient that is wanted of an absent input."""
    if len(output_mask) != len(inputs):
        fail(op, "output_mask", f"of {len(inputs)} entries", len(output_mask))
    for wanted, (name, tensor) in zip(output_mask, inputs.items(), strict=True):
        if wanted and tensor is None:
            fail(op, name, "given when output_mask asks for its gradient", None)


def check_dropout(op: str, seed: torch.Tensor | None, p: float) -> None:
    if not 0.0 <= p < 1.0:
        fail(op, "dropout_p", "in [0, 1)", p)
    if p > 0.0 and seed is None:
        fail(op, "seed", "a tensor when dropout_p > 0", None)
    check_like(op, "seed", seed, (1,), (torch.int64,))


def cdiv(n: int, d: int) -> int:
    """n / d rounded up. Triton's own costs microseconds a call."""
    return -(-n // d)


def power_of_two(n: int) -> int:
    """The smallest one that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 under the interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> int:
    """90 for sm_90; without a GPU the one that the plans are made for."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def stages(device: torch.device, wanted: int) -> int:
    """Pipeline stages of a kernel's loads: one where a block has less shared memory than an A100's.

    Tiles are chosen for the 163 KB of sm_80 and more; consumer GPUs (sm_86, 89, 120) have 99 KB.
    """
    if device.type != "cuda":
        return wanted
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return wanted if shared >= 160 * 1024 else 1


def _row_groups(
    sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> list[tuple[int, list[int]]]:
    """[(size, stride per tensor)] of the dims, merged wherever every tensor allows it."""
    groups: list[tuple[int, list[int]]] = []
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        here = [stride[dim] for stride in strides]
        if groups and groups[-1][1] == [stride * size for stride in here]:
            groups[-1] = (groups[-1][0] * size, here)
        else:
            groups.append((size, here))
    return groups


def collapse_rows(
    *tensors: torch.Tensor | None,
) -> tuple[int, list[torch.Tensor | None], list[tuple[int, int, int]]]:
    """Tensors of one shape (..., C) as rows: (inner_rows, tensors, strides of each tensor).

    Strides are (outer, inner, column), zeros for None: row r lies at
    (r // inner_rows) * outer + (r % inner_rows) * inner. Two levels cover batches, tokens,
    transposes and expands; only a tensor that needs a third one is copied.
    """
    present = [t for t in tensors if t is not None]
    lead = present[0].shape[:-1]
    groups = _row_groups(lead, [t.stride() for t in present])
    if len(groups) > 2:
        present = [
            t if len(_row_groups(lead, [t.stride()])) < 2 else t.contiguous() for t in present
        ]
        groups = _row_groups(lead, [t.stride() for t in present])
    while len(groups) < 2:
        groups.insert(0, (1, [0] * len(present)))
    (_, outer), (inner_rows, inner) = groups
    columns = [t.stride(-1) for t in present]
    found = iter(zip(present, zip(outer, inner, columns, strict=True), strict=True))
    pairs = [(None, (0, 0, 0)) if t is None else next(found) for t in tensors]
    return inner_rows, [t for t, _ in pairs], [s for _, s in pairs]
