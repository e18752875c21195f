"""Compare kernels by one error model; make inputs in every layout. For tests, benchmarks and users.

    truth: the reference in float64 from the same rounded inputs
    base:  plain PyTorch eager in the tested dtype
    S:     the largest |truth| over all outputs (or all gradients) of the call

    fp32        max |ours - truth| <= max(2 x base's, 8 eps S)    RMSE <= max(1.5 x base's, 2 eps S)
    bf16, fp16  max |ours - truth| <= base's + 1 ulp(S)           RMSE <= 1.1 x base's
                |mean(error * sign(truth))| <= 0.1 RMSE for 4096 values or more: no truncation

NaN and infinities must sit exactly where the truth has them. Only torch is imported.

    from vitkernels import testing
    y = my_layer_norm(x)
    testing.assert_close_to_truth(y, F.layer_norm(x, (C,)), F.layer_norm(x.double(), (C,)))
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import _native
from ._layouts import LAYOUTS as LAYOUTS
from ._layouts import in_layout as in_layout

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *SIXTEEN_BIT)
EPS32 = torch.finfo(torch.float32).eps
TRUNCATION_TEST_FROM = 4096  # values; below that the mean is too noisy to tell truncation from luck


# ---- The error model


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far one output is from its truth, over the places where the truth is finite."""

    max: float
    rmse: float
    drift: float  # mean(error * sign(truth)): what truncation instead of rounding shows up in

    @staticmethod
    def between(output: Tensor, truth: Tensor) -> Errors:
        error = output.detach().double() - truth.detach().double()
        error = error[torch.isfinite(truth)]
        if error.numel() == 0:
            return Errors(0.0, 0.0, 0.0)
        sign = truth[torch.isfinite(truth)].double().sign()
        return Errors(
            error.abs().max().item(),
            error.square().mean().sqrt().item(),
            (error * sign).mean().item(),
        )


def ulp(scale: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` at `scale`."""
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(abs(scale), info.tiny)))
    return info.eps * 2.0**exponent


def assert_close_to_truth(
    ours,
    base,
    truth,
    dtype: torch.dtype | None = None,
    *,
    what: str | Sequence[str] = "output",
    rmse_factor: float | None = None,
    truncating_stores: bool = False,
    slack: float = 1.0,
) -> None:
    """Raise AssertionError, with every number, unless `ours` is within the error model.

    ours, base, truth: a tensor, or equally long sequences of tensors (None matches None); all the
        outputs, or all the gradients, of one call, because S is taken over all of them.
    dtype: the precision the call was made in; by default each output's own. Name it where an fp32
        output, such as a gradient of an fp32 weight, was computed from 16-bit activations.
    rmse_factor: how far ours may be from base's RMSE; 1.1 in 16 bits and 1.5 in fp32 by default.
    truncating_stores: Triton's interpreter truncates where hardware rounds; allows one more ulp.
    slack: multiplies the limits; more than 1 is for stock PyTorch, and drops the truncation test.
    """
    ours, base, truth = as_tuple(ours), as_tuple(base), as_tuple(truth)
    names = [what] if isinstance(what, str) else list(what)
    if len(names) != len(ours):
        names = [f"{names[0]}[{i}]" for i in range(len(ours))]
    assert len(ours) == len(base) == len(truth), (
        f"{what}: {len(ours)} of ours, {len(base)} of base, {len(truth)} of truth"
    )
    scale = largest(truth)
    problems: list[str] = []
    for name, mine, peer, exact in zip(names, ours, base, truth, strict=True):
        if exact is None or mine is None or peer is None:
            if mine is not None or peer is not None or exact is not None:
                problems.append(
                    f"{name}: ours is {_brief(mine)}, base {_brief(peer)}, truth {_brief(exact)}"
                )
            continue
        allowed = (dtype or mine.dtype, scale, rmse_factor, truncating_stores, slack)
        problems += _compare(name, (mine, peer, exact), *allowed)
    assert not problems, "\n".join(["not within the error model:", *problems])


def _compare(name, tensors, dtype, scale, rmse_factor, truncating, slack) -> list[str]:
    ours, base, truth = tensors
    if ours.shape != truth.shape or base.shape != truth.shape:
        shapes = tuple(tuple(t.shape) for t in (ours, base, truth))
        return [f"{name}: shapes ours {shapes[0]}, base {shapes[1]}, truth {shapes[2]}"]
    truth = truth.detach().double()
    special = same_specials(ours, truth, name)
    if special:
        return [special]
    # What overflows in our dtype is special there; what base overflows on is base's own trouble.
    truth = torch.where(torch.isfinite(truth.to(ours.dtype)), truth, torch.inf)
    mine, peer = Errors.between(ours, truth), Errors.between(base, truth)
    if not math.isfinite(peer.rmse):
        peer = Errors.between(truth.to(ours.dtype), truth)
    n = truth.numel()
    # Where inputs are expanded, outputs repeat: so do their errors, and few of them tell little.
    distinct = truth.unique().numel() if n < TRUNCATION_TEST_FROM else n
    limits = _limits(dtype, peer, scale, distinct, rmse_factor, truncating)
    max_limit, rmse_limit = (slack * limit for limit in limits)

    problems = []
    if not mine.max <= max_limit:
        problems.append(f"max error {mine.max:.4g} > {max_limit:.4g}; {_worst(ours, base, truth)}")
    if not mine.rmse <= rmse_limit:
        problems.append(f"RMSE {mine.rmse:.4g} > {rmse_limit:.4g}")
    rounds = (
        not truncating and slack == 1 and ours.dtype in SIXTEEN_BIT and n >= TRUNCATION_TEST_FROM
    )
    if rounds and abs(mine.drift) > max(0.1 * mine.rmse, 2 * EPS32 * scale):
        problems.append(
            f"mean(error * sign(truth)) {mine.drift:.4g} > 0.1 RMSE: truncated, not rounded"
        )
    numbers = (
        f"ours max {mine.max:.4g} RMSE {mine.rmse:.4g}, base max {peer.max:.4g} RMSE "
        f"{peer.rmse:.4g}, S {scale:.4g}, {n} values, precision {_short(dtype)}, "
        f"stored {_short(ours.dtype)}"
    )
    return [f"{name}: {problem} ({numbers})" for problem in problems]


def _limits(dtype, peer, scale, n, rmse_factor, truncating) -> tuple[float, float]:
    """The largest max error and RMSE allowed beside `peer`, the errors of plain PyTorch."""
    # The RMSEs of two equally good results of n values scatter by about 1 / sqrt(n).
    few = 2 / math.sqrt(max(n, 1)) if n < TRUNCATION_TEST_FROM else 0.0
    if dtype not in SIXTEEN_BIT:
        rmse = ((rmse_factor or 1.5) + few) * peer.rmse
        return max(2 * peer.max, 8 * EPS32 * scale), max(rmse, 2 * EPS32 * scale)
    one_ulp = ulp(scale, dtype)
    if truncating:  # truncation has twice the RMSE of rounding
        return peer.max + 2 * one_ulp, max(2.2 * peer.rmse, one_ulp)
    rmse = ((rmse_factor or 1.1) + few) * peer.rmse
    return peer.max + one_ulp, max(rmse, 2 * EPS32 * scale)


def same_specials(output: Tensor, truth: Tensor, name: str = "output") -> str:
    """ "" when NaN, +Inf and -Inf are in the same places in both, else a sentence on it."""
    expected = truth.detach().to(output.dtype)
    output = output.detach()
    for kind, test in (
        ("NaN", torch.isnan),
        ("+Inf", torch.isposinf),
        ("-Inf", torch.isneginf),
    ):
        got, want = test(output), test(expected)
        if not torch.equal(got, want):
            where = (got != want).nonzero()
            first = tuple(where[0].tolist())
            return (
                f"{name}: {kind} differs at {len(where)} of {truth.numel()} places, first at "
                f"{first}: ours {output[first].item():.6g}, expected {expected[first].item():.6g}"
            )
    return ""


def assert_bitwise_equal(a, b, what: str = "output") -> None:
    """Raise AssertionError unless all values have the same bits (so that NaN equals NaN)."""
    for i, (x, y) in enumerate(zip(as_tuple(a), as_tuple(b), strict=True)):
        if x is None or y is None:
            assert x is y, f"{what}[{i}]: {_brief(x)} and {_brief(y)}"
            continue
        assert x.dtype == y.dtype and x.shape == y.shape, f"{what}[{i}]: {_brief(x)}, {_brief(y)}"
        if not torch.equal(_bits(x), _bits(y)):
            different = (_bits(x) != _bits(y)).sum().item()
            gap = (x.double() - y.double()).abs().nan_to_num().max().item()
            raise AssertionError(
                f"{what}[{i}]: {different} of {x.numel()} values differ in bits, by up to {gap:.4g}"
            )


def largest(tensors) -> float:
    """The largest finite magnitude over one or many tensors, 0 when there is none."""
    values = [t.detach().double().abs() for t in as_tuple(tensors) if t is not None and t.numel()]
    return max(
        (v[torch.isfinite(v)].max().item() for v in values if torch.isfinite(v).any()),
        default=0.0,
    )


# ---- Gradients


def grads_of(
    fn: Callable, inputs: Sequence, output_grads: Sequence | None = None
) -> tuple[tuple, tuple]:
    """(outputs, gradients) of `fn(*inputs)`, strides of the inputs kept.

    Every floating tensor among `inputs` is differentiated; the gradient of anything else, and of a
    tensor that `fn` did not use, is None. `output_grads` pairs with the outputs (None: no gradient
    comes in there); when it is left out, ones come in, expanded, as from `.sum().backward()`.
    """
    leaves = [
        t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in inputs
    ]
    outputs = as_tuple(fn(*leaves))
    if output_grads is None:
        output_grads = [o.new_ones(()).expand(o.shape) for o in outputs]
    pairs = [
        (out, grad.to(out.dtype))
        for out, grad in zip(outputs, output_grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    grads = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    )
    every = tuple(
        next(grads) if isinstance(t, Tensor) and t.requires_grad else None for t in leaves
    )
    return tuple(o.detach() for o in outputs), every


# ---- Inputs that stay as they are


@contextlib.contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    """Assert that the block writes nothing into the tensors, nor into the memory around them."""
    given = [t for t in tensors if t is not None]
    before = [_whole_storage(t).clone() for t in given]
    yield
    for i, (tensor, old) in enumerate(zip(given, before, strict=True)):
        assert torch.equal(_whole_storage(tensor), old), (
            f"input {i} {_brief(tensor)} was written to"
        )


def _whole_storage(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.detach().untyped_storage())


# ---- Which backends can run here, and how many cases were compared


def available_for(op: str, device: str | torch.device = "cpu", **facts) -> tuple[str, ...]:
    """The backends that serve public operator `op` on `device` here, in its table's order.

    facts: what the operator's limits depend on, such as `D=64` of attention.
    """
    import vitkernels.ops

    table = importlib.import_module(getattr(vitkernels.ops, op).__module__).BACKENDS
    return tuple(b.name for b in table if b.refusal(torch.device(device), (), facts) is None)


@contextlib.contextmanager
def cuda_path(name: str) -> Iterator[None]:
    """Have the CUDA kernels take one path inside the block: "simt", "sm80", "sm90", or "auto" for
    the fastest that serves. A call that the path refuses raises RuntimeError with its reason."""
    before = _native.force_cuda_path(name)
    try:
        yield
    finally:
        _native.force_cuda_path(before)


class DistinctCases:
    """A case is a distinct (operator, backend, dtype, shape class, layout) that compares values."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, ...]] = set()

    def record(self, op: str, backend: str, dtype, shape, layout: str = "contiguous") -> None:
        """Note one compared case; `dtype` and `shape` are anything that prints as what varied."""
        self.seen.add((op, backend, _short(dtype), str(shape), layout))

    def merge(self, others: Iterable[Sequence[str]]) -> None:
        self.seen |= {tuple(other) for other in others}

    def summary(self) -> str:
        """One line, such as `180 distinct cases: add_layer_norm cpu 120, triton 60`."""
        counts: dict[str, dict[str, int]] = {}
        for op, backend, *_ in sorted(self.seen):
            per_backend = counts.setdefault(op, {})
            per_backend[backend] = per_backend.get(backend, 0) + 1
        parts = [
            f"{op} " + ", ".join(f"{backend} {n}" for backend, n in per_backend.items())
            for op, per_backend in counts.items()
        ]
        return f"{len(self.seen)} distinct cases: " + "; ".join(parts)


cases = DistinctCases()


def as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _bits(t: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(integer)


def _brief(t: Tensor | None) -> str:
    return "None" if t is None else f"{_short(t.dtype)}{tuple(t.shape)}"


def _short(dtype) -> str:
    names = {
        torch.float32: "fp32",
        torch.float64: "fp64",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
    }
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _worst(ours: Tensor, base: Tensor, truth: Tensor) -> str:
    error = torch.where(torch.isfinite(truth), (ours.double() - truth).abs(), 0.0)
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), truth.shape))
    return (
        f"at {index} ours {ours[index].item():.8g}, base {base[index].item():.8g}, "
        f"truth {truth[index].item():.8g}"
    )
