"""The only dispatch code: declare raw operators, choose a backend, force one.

An operator's slice declares each raw operator once, as data: a schema string, a fake (shapes and
dtypes of the outputs) and the reference implementation. `declare` makes one default overload (what
`auto` records in traced and exported graphs) and one overload per kernel backend. The `torch`
backend is no overload: it is a composition of stock PyTorch operators that autograd and
torch.compile see through.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import forward_ad

from . import _native, _regimes, _sharding

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_BACKENDS = (
    "cpu",
    "cuda",
    "triton",
    "reference",
)  # those with an overload of each raw operator
BACKEND_NAMES = ("cpu", "cuda", "triton", "torch", "reference")

_LIBRARY = torch.library.Library("vitkernels", "DEF")
_forced: str | None = (
    None  # set by use_backend; a module global because torch.compile can guard on it
)
regime_of_raw: dict[
    str, Callable
] = {}  # raw operator -> (operator, sizes, variant) of its arguments


# --- declaring raw operators ----------------------------------------------------------------------


def declare(
    name: str, schema: str, *, fake: Callable, reference: Callable, regime: Callable
) -> None:
    """Define `vitkernels::name` with its default overload and one overload per kernel backend.

    schema: everything after the name, e.g. "(Tensor x) -> Tensor". The `_triton` module beside
    the reference's is imported at the first call of the Triton overload (importing triton costs 150
    ms), the `_sharding` module at the first call with DTensors. C++ registers its own overloads
    when its library is loaded. regime: (operator, sizes,
    variant) of the raw arguments, as the public function hands them to `choose`.
    """
    package = reference.__module__.rpartition(".")[0]
    triton = _lazy(package + "._triton", name)
    reference = _without_autocast(reference)
    for overload in ("", *KERNEL_BACKENDS):
        qualified = f"{name}.{overload}" if overload else name
        _LIBRARY.define(qualified + schema)
        torch.library.register_fake(f"vitkernels::{qualified}", fake, lib=_LIBRARY)
    _LIBRARY.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
    for device in _native.devices["triton"]:
        _LIBRARY.impl(f"{name}.triton", triton, device.upper())
    regime_of_raw[name] = regime
    _LIBRARY.impl(name, _preferred_kernel(name), "CUDA")
    if (
        _native.missing["cpu"] is not None
    ):  # the C++ library registers the default overload for CPU itself
        _LIBRARY.impl(name, reference, "CPU")
    _sharding.declare(name, package, fake)


def overload(name: str, backend: str) -> Callable:
    """The raw operator's overload for a backend; `auto` is the default overload."""
    packet = getattr(torch.ops.vitkernels, name)
    return packet.default if backend == "auto" else getattr(packet, backend)


def _lazy(module: str, name: str) -> Callable:
    def call(*args):
        return getattr(importlib.import_module(module), name)(*args)

    return call


def _without_autocast(fn: Callable) -> Callable:
    """A raw operator computes in the dtypes given; the public function has read autocast."""

    @functools.wraps(fn)
    def call(*args):
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return fn(*args)
        return fn(*args)

    return call


def _preferred_kernel(name: str) -> Callable:
    """What the default overload of an exported graph runs on CUDA: the winner recorded for this
    call's regime, else the reference. A forward cannot know whether a backward will follow."""
    directions = (True,) if name.endswith("_bwd") else (False, True)

    def call(*args):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        dtypes = tuple(t.dtype for t in tensors)
        op, sizes, variant = regime_of_raw[name](*args)
        for training in directions:
            of_call = _regimes.regime(op, dtypes, training, sizes, variant)
            winner = recorded_winner(op, tensors[0].device, of_call)
            if winner is not None:
                return overload(name, winner)(*args)
        return overload(name, "reference")(*args)

    return call


# --- choosing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One row of an operator's BACKENDS table; `limit` maps a call's facts to a refusal."""

    name: str
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    limit: Callable[..., str | None] | None = None
    # Whether `auto` takes it, given the dtypes and whether a gradient is wanted; None: always.
    auto: Callable[[tuple[torch.dtype, ...], bool], bool] | None = None

    def refusal(
        self, device: torch.device, dtypes: tuple[torch.dtype, ...], facts: dict
    ) -> str | None:
        if _native.missing[self.name] is not None:
            return _native.missing[self.name]
        if device.type not in _native.devices[self.name]:
            return f"it takes {' or '.join(_native.devices[self.name])} tensors, got {device.type}"
        for dtype in dtypes:
            if dtype not in self.dtypes:
                return f"it takes {', '.join(_short(d) for d in self.dtypes)}, got {_short(dtype)}"
        return self.limit(**facts) if self.limit is not None else None


def choose(
    op: str,
    table: tuple[Backend, ...],
    requested: str | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    *,
    training: bool = True,
    sizes: tuple[int, ...] | None = None,
    variant: str = "",
    **facts,
) -> str:
    """The backend that serves this call: "auto" (the default overload), or a name from the table.

    A request by argument or `use_backend` is served or refused with every backend's reason, never
    replaced. sizes, variant: of the call's regime (`_regimes.SIZES`); without sizes no hardware
    record applies. facts: what the backends' limits depend on.
    """
    name = requested if requested is not None else _forced
    if device.type == "meta" and (name is None or name in BACKEND_NAMES):
        return "reference"
    if name is not None:
        for backend in table:
            if backend.name == name:
                if backend.refusal(device, dtypes, facts) is None:
                    return name
                raise ValueError(_refusals(op, name, table, device, dtypes, facts))
        raise ValueError(f"{op}: backend must be one of {[b.name for b in table]}, got {name!r}")
    if torch.float64 in dtypes:
        return "reference"
    winner: str | None = "cpu"
    if device.type != "cpu":
        of_call = None
        if sizes is not None:
            of_call = _regimes.regime(op, dtypes, training, sizes, variant)
        winner = recorded_winner(op, device, of_call)
    for backend in table:
        if backend.name == winner and backend.refusal(device, dtypes, facts) is None:
            if backend.auto is not None and not backend.auto(dtypes, training):
                return "torch"
            # An exported graph may run elsewhere: it records the default overload.
            by_name = device.type != "cpu" and not torch.compiler.is_exporting()
            return backend.name if by_name else "auto"
    return "torch"


def without_matrix_unit(dtypes: tuple[torch.dtype, ...], training: bool) -> bool:
    """For a C++ kernel that has no AMX version: `auto` leaves bf16 products to stock PyTorch where
    the processor multiplies them in its matrix unit (6 to 15 times the rate of AVX512-BF16)."""
    return torch.bfloat16 not in dtypes or not _native.cpu_multiplies_in_matrix_unit


def without_matrix_unit_at_inference(dtypes: tuple[torch.dtype, ...], training: bool) -> bool:
    """The same, of one whose backward makes up for what its forward loses."""
    return training or without_matrix_unit(dtypes, training)


def _refusals(op, name, table, device, dtypes, facts) -> str:
    reasons = {b.name: b.refusal(device, dtypes, facts) for b in table}
    others = "; ".join(f"{n}: {r or 'can serve it'}" for n, r in reasons.items() if n != name)
    return f"{op}: backend={name!r} cannot serve this call: {reasons[name]}. Others - {others}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- hardware records -----------------------------------------------------------------------------

# compute capability -> operator -> regime -> the backend that passed its checks and won there
Records = dict[str, dict[str, dict[str, str]]]


def user_records() -> Path:
    """Where `vitkernels tune` keeps what it measured."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vitkernels" / "records.json"


def _load_records() -> Records:
    """The records shipped with the package, then the user's, which replace an operator's regimes.

    {"sm_90": {"facts": {...}, "operators": {"attention": {"forward 16-bit N<=64 D<=64":
    {"backend": "cuda", ...}}}}}; the backend is null where stock PyTorch was faster.
    """
    found = []
    shipped = sorted((Path(__file__).parent / "records").glob("*.json"))
    for path in (*shipped, user_records()):
        try:
            record = json.loads(path.read_text())
            merged([record])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"vitkernels: hardware record {path.name} is unreadable, ignored: {why}",
                stacklevel=2,
            )
            continue
        found.append(record)
    return merged(found)


def merged(files: list[dict]) -> Records:
    """The winners of records in that form; a later file replaces regimes of an earlier one."""
    records: Records = {}
    for file in files:
        for arch, operators in _winners(file).items():
            for op, regimes in operators.items():
                known = records.setdefault(arch, {}).setdefault(op, {})
                for regime, backend in regimes.items():
                    known.pop(regime, None)
                    if backend is not None:
                        known[regime] = backend
    return records


def _winners(record: dict) -> dict[str, dict[str, dict[str, str | None]]]:
    """A whole file's, so that one bad entry makes nothing of it count."""
    found: dict[str, dict[str, dict[str, str | None]]] = {}
    for arch, of_arch in record.items():
        for op, regimes in of_arch["operators"].items():
            for regime, entry in regimes.items():
                backend = entry["backend"]
                if backend is not None and backend not in ("cuda", "triton"):
                    raise ValueError(f"{op}: {regime}: backend {backend!r} is no GPU kernel")
                found.setdefault(arch, {}).setdefault(op, {})[regime] = backend
    return found


_RECORDS = _load_records()
_hinted = False


def recorded_winner(op: str, device: torch.device, regime: str | None) -> str | None:
    """The kernel that has a hardware record for this regime on this GPU, or None."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    of_arch = _RECORDS.get(f"sm_{major}{minor}")
    if of_arch is None and not torch.compiler.is_compiling():
        _hint(f"sm_{major}{minor}")
    if of_arch is None or regime is None:
        return None
    return of_arch.get(op, {}).get(regime)


def _hint(arch: str) -> None:
    global _hinted
    if not _hinted:
        _hinted = True
        warnings.warn(
            f"vitkernels: no kernel has a hardware record for {arch} yet, so stock PyTorch runs. "
            "use_backend('triton') or use_backend('cuda') forces a kernel; "
            "`vitkernels tune` makes the record in two minutes.",
            stacklevel=4,
        )


# --- forcing --------------------------------------------------------------------------------------


class use_backend:
    """Force one backend for every vitkernels operator inside a `with` block: `with
    use_backend("triton"): ...`.

    name: "cpu", "cuda", "triton", "torch" or "reference"; None or "auto" gives the choice back. A
    call that the backend cannot serve raises ValueError with every backend's reason. Applies to the
    whole process, not to one thread.
    """

    def __init__(self, name: str | None):
        if name is not None and name != "auto" and name not in BACKEND_NAMES:
            raise ValueError(
                f"use_backend: name must be one of {[*BACKEND_NAMES, 'auto']}, got {name!r}"
            )
        self.name = None if name == "auto" else name

    def __enter__(self) -> use_backend:
        global _forced
        self.previous = _forced
        _forced = self.name
        return self

    def __exit__(self, *exc) -> None:
        global _forced
        _forced = self.previous


def available_backends() -> list[str]:
    """The backends that can run on this machine, in the order of preference of the tables."""
    return [name for name in BACKEND_NAMES if _native.missing[name] is None]


# --- what the operators' public functions share ---------------------------------------------------


def needs_autograd(*tensors: torch.Tensor | None) -> bool:
    """Whether the call must go through its autograd.Function.

    A dual tensor of forward-mode AD must too: the Function refuses it, a raw operator would drop
    the tangent without a word.
    """
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if forward_mode and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        return True
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def keep_signature(function: type) -> type:
    """Class decorator of an autograd.Function: torch binds the arguments of `forward` at every call
    through inspect.signature, which takes 5 to 10 us to rebuild what is kept here."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def no_autocast(device: torch.device) -> AbstractContextManager:
    """What runs in the dtypes of its tensors, also under torch.autocast."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on this device, or None outside autocast."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def computed_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Autocast's, else the input's own; float64 stays float64, as in stock PyTorch."""
    return dtype if dtype == torch.float64 else autocast_dtype(device) or dtype
