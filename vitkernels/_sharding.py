"""Sharding rules: what each raw operator does with DTensors, by its slice's `_sharding` module.

A rule is a function with the raw operator's name. It gets the operator's arguments by name, tensors
on the meta device, and returns the ways in which the work may be split besides not at all, each as
(outputs, inputs): names of the schema to the dimension that is sharded, or SUM for an output whose
parts add up. What is not named is replicated. For example, a product's rows, and what it sums over:

    def matmul(a, b, **_):
        return [({"out": 0}, {"a": 0}), ({"out": SUM}, {"a": 1, "b": 0})]

A call takes the cheapest way for each dimension of the mesh, moves what lies elsewhere, and runs
the kernel on the parts; a plain Tensor among DTensors is one that all processes have. (PyTorch's
register_sharding is for operators whose first result is always there; a backward computes what its
output_mask asks for.)

The rules reach DTensor when torch.distributed.tensor is imported, before or after vitkernels: it
takes as long as half of torch, and few programs want it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable

import torch

SUM = "sum"
DTENSOR = "torch.distributed.tensor"
Placements = dict[str, int | str]
Split = tuple[Placements, Placements]
Rule = Callable[..., list[Split]]

_declared: dict[str, tuple[str, Callable]] = {}  # raw operator: (its slice's package, its fake)


def declare(name: str, package: str, fake: Callable) -> None:
    """A raw operator's rule is `name` in `package`._sharding, for all of its overloads."""
    _declared[name] = (package, fake)
    if DTENSOR in sys.modules:
        _register(name)


def rule_of(name: str) -> Rule:
    return getattr(importlib.import_module(_declared[name][0] + "._sharding"), name)


def dims(dim: int | str, *names: str) -> Placements:
    """The names, each with one dimension, or SUM."""
    return dict.fromkeys(names, dim)


def _register(name: str) -> None:
    from torch.distributed.tensor import DTensor

    packet = getattr(torch.ops.vitkernels, name)
    for overload in packet.overloads():
        call = functools.partial(_run, name)
        torch.library.register_torch_dispatch(getattr(packet, overload), DTensor, call)


# --- a call ---------------------------------------------------------------------------------------


def _run(name: str, cls, func, types, args=(), kwargs=None):
    """The kernel on each process's parts of DTensors, its results as DTensors."""
    from torch.distributed.tensor import DTensor

    schema = func._schema
    names = [argument.name for argument in schema.arguments]
    named = dict(zip(names, args, strict=True))
    tensors: dict = {n: a for n, a in named.items() if isinstance(a, torch.Tensor)}
    mesh = next(t for t in tensors.values() if isinstance(t, DTensor)).device_mesh
    for n, t in tensors.items():
        if not isinstance(t, DTensor):  # public functions have compared its shape with the whole's
            tensors[n] = DTensor.from_local(t, mesh, [_placement(None)] * mesh.ndim)
        elif t.device_mesh != mesh:
            raise ValueError(
                f"{name}: {n} must be on {mesh} as the others are, got {t.device_mesh}"
            )

    on_meta = {n: _as_meta(a) if n in tensors else a for n, a in named.items()}
    ways: list[Split] = [({}, {}), *rule_of(name)(**on_meta)]
    chosen = [_cheapest(ways, tensors, mesh, dim) for dim in range(mesh.ndim)]
    with torch.no_grad():
        for n, t in tensors.items():
            placements = [_placement(inputs.get(n)) for _, inputs in chosen]
            named[n] = t.redistribute(placements=placements).to_local()
        local = func(*named.values())

        results = []
        made = _declared[name][1](*on_meta.values())
        for i, (part, whole) in enumerate(zip(_as_tuple(local), _as_tuple(made), strict=True)):
            if part is not None:
                result = schema.returns[i].name
                placements = [_placement(outputs.get(result)) for outputs, _ in chosen]
                part = DTensor.from_local(
                    part, mesh, placements, shape=whole.shape, stride=whole.stride()
                )
            results.append(part)
    return tuple(results) if isinstance(local, tuple) else results[0]


def _cheapest(ways: list[Split], tensors: dict, mesh, dim: int) -> Split:
    """The way that moves fewest bytes along a dimension of the mesh; of equals, the first."""

    def cost(way: Split) -> float:
        total = 0.0
        for name, tensor in tensors.items():
            wanted, size = way[1].get(name), mesh.size(dim)
            if isinstance(wanted, int) and tensor.shape[wanted] < size:
                return math.inf
            total += _moved(tensor.placements[dim], _placement(wanted)) * tensor.nbytes
        return total

    return min(ways, key=cost)


def _moved(now, wanted) -> float:
    """Of a tensor's bytes, how many a process sends to change its placement; a bit for a cut."""
    if now == wanted:
        return 0.0
    if now.is_replicate():
        return 1e-6
    return 2.0 if now.is_partial() and wanted.is_replicate() else 1.0


def _placement(where: int | str | None):
    from torch.distributed.tensor import Partial, Replicate, Shard

    if isinstance(where, int):
        return Shard(where)
    return Replicate() if where is None else Partial()


def _as_meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def beside(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor as it enters a call with `like`: beside a DTensor the first process's."""
    if type(like).__name__ != "DTensor":
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim)


# --- when torch.distributed.tensor comes later ----------------------------------------------------


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch.distributed.tensor as usual, once, and registers the rules after it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != DTENSOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        for name in _declared:
            _register(name)


if DTENSOR not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
