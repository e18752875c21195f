"""One call of an operator with its options, and how to judge it: shared by the operators' tests.

A Problem holds the tensors that get gradients (`inputs`), everything else (`options`), and two
other ways to compute the same: `spec`, the differentiable specification, run in float64 as the
truth; and `eager`, plain PyTorch in the tested dtype, whose errors are the yardstick.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable

import pytest
import torch

import vitkernels.ops
from vitkernels import testing
from vitkernels.testing import SIXTEEN_BIT

DTYPE_IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INPUT_DTYPE_IDS = DTYPE_IDS | {torch.uint8: "uint8"}


@dataclasses.dataclass
class Problem:
    op: str
    inputs: dict[str, torch.Tensor | None]
    options: dict
    spec: Callable
    eager: Callable
    outputs: tuple[str, ...]
    gradient_groups: tuple[tuple[str, ...], ...]
    precision: torch.dtype | None = torch.float32  # of the gradients; None: each one's own dtype
    seed: int = 5
    autocast: torch.dtype | None = None  # what ours runs under

    def laid_out(self, layout: str) -> Problem:
        inputs = {
            name: None if t is None else testing.in_layout(t, layout)
            for name, t in self.inputs.items()
        }
        return dataclasses.replace(self, inputs=inputs)

    def to(self, device: str | torch.device) -> Problem:
        def moved(values):
            return {
                name: v.to(device) if isinstance(v, torch.Tensor) else v
                for name, v in values.items()
            }

        return dataclasses.replace(self, inputs=moved(self.inputs), options=moved(self.options))

    def double(self) -> Problem:
        inputs = {
            n: t.double() if t is not None and t.is_floating_point() else t
            for n, t in self.inputs.items()
        }
        options = dict(self.options)
        if isinstance(options.get("row_scale"), torch.Tensor):
            options["row_scale"] = options["row_scale"].double()
        if "out_dtype" in options:
            options["out_dtype"] = torch.float64
        return dataclasses.replace(self, inputs=inputs, options=options)

    def dropout_seed(self) -> torch.Tensor:
        """What the public function draws after torch.manual_seed(self.seed)."""
        device = next(iter(self.inputs.values())).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            return torch.randint(0, 2**62, (1,), device=device)

    def slack_of(self, names: tuple[str, ...]) -> float:
        """What multiplies the limits of these outputs, or of the gradients of these inputs."""
        return 1.0

    # Each takes the inputs in order, so that testing.grads_of can differentiate it.

    def ours(self, backend: str | None = None, **changes) -> Callable:
        call = self.unseeded(backend)

        def seeded(*tensors):
            torch.manual_seed(self.seed)
            return call(*tensors, **changes)

        return seeded

    def unseeded(self, backend: str | None = None) -> Callable:
        """For torch.compile, which cannot trace torch.manual_seed."""
        function, names, options = getattr(vitkernels.ops, self.op), list(self.inputs), self.options

        def call(*tensors, **changes):
            named = dict(zip(names, tensors, strict=True))
            return function(**named, **{**options, **changes}, backend=backend)

        if self.autocast is None:
            return call
        device = next(iter(self.inputs.values())).device.type
        return torch.autocast(device, self.autocast)(call)

    def truth(self) -> Callable:
        return self._other(self.spec, self.double().options)

    def base(self) -> Callable:
        return self._other(self.eager, self.options)

    def _other(self, function, options):
        def call(*tensors):
            named = dict(zip(self.inputs, tensors, strict=True))
            return function(**named, **options, seed=self.dropout_seed())

        return call


def output_gradients(problem: Problem, outputs, layout: str = "contiguous"):
    generator = torch.Generator().manual_seed(problem.seed + 1)
    return [
        testing.in_layout(torch.randn(o.shape, generator=generator).to(o), layout) for o in outputs
    ]


def check(
    problem: Problem,
    backend: str,
    *,
    shape_class: str,
    layout: str = "contiguous",
    grad_layout: str | None = None,
    rmse_factor: float | None = None,
    slack: float = 1.0,
    wanted: tuple[str, ...] | None = None,
    used: tuple[str, ...] | None = None,
) -> None:
    """Forward and every gradient of `backend` against the truth; inputs stay as they were.

    grad_layout: of the incoming gradients; "ones" is the expanded one of `.sum().backward()`, None
    the layout of the inputs. wanted: the inputs that need a gradient, by default all. used: the
    outputs that the loss depends on, by default all. slack: multiplies the limits.
    """
    problem = problem.laid_out(layout)
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    grads = None
    if grad_layout != "ones":
        grads = output_gradients(problem, outputs, grad_layout or layout)
        if used is not None:
            pairs = zip(problem.outputs, grads, strict=True)
            grads = [grad if name in used else None for name, grad in pairs]
    leaves = _freeze(problem, wanted)
    with testing.unchanged(*tensors, *(grads or ())):
        ours, our_grads = leaves(problem.ours(backend), tensors, grads)
    base, base_grads = leaves(problem.base(), tensors, grads)
    doubles = list(problem.double().inputs.values())
    exact, exact_grads = leaves(problem.truth(), doubles, grads)

    truncating = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    common = {
        "rmse_factor": rmse_factor,
        "truncating_stores": truncating,
    }
    if backend == "torch":
        slack *= 2  # stock kernels round elsewhere
    what = f"{problem.op} {backend} {shape_class} {layout}"
    names = [f"{what}: {name}" for name in problem.outputs]
    if backend not in ("torch", "reference"):  # stock kernels differ when a gradient is wanted
        testing.assert_bitwise_equal(ours, outputs, f"{what}: with and without gradient")
    allowed = slack * problem.slack_of(problem.outputs)
    testing.assert_close_to_truth(ours, base, exact, what=names, slack=allowed, **common)
    for group in problem.gradient_groups:
        picked = [
            [dict(zip(problem.inputs, g, strict=True))[name] for name in group]
            for g in (our_grads, base_grads, exact_grads)
        ]
        for name, mine, exact_grad in zip(group, picked[0], picked[2], strict=True):
            assert (mine is None) == (exact_grad is None), f"{what}: gradient of {name} is {mine}"
            if mine is not None:
                given = problem.inputs[name]
                assert mine.dtype == given.dtype and mine.shape == given.shape, f"{what}: d{name}"
        names = [f"{what}: d{name}" for name in group]
        allowed = slack * problem.slack_of(group)
        testing.assert_close_to_truth(
            *picked, dtype=problem.precision, what=names, slack=allowed, **common
        )
    dtype = DTYPE_IDS[problem.precision or torch.float32]
    dtypes = {INPUT_DTYPE_IDS[t.dtype] for t in tensors if t is not None}
    label = dtype if dtypes == {dtype} else "+".join(sorted(dtypes | {dtype}))
    if grad_layout is not None:
        layout = f"{layout}, incoming {grad_layout}"
    testing.cases.record(problem.op, backend, label, shape_class, layout)


def check_repeats(problem: Problem, backend: str, wanted=None, repeats: int = 1) -> None:
    """The same bits again; a gradient does not depend on which others are wanted.

    wanted: groups of inputs; each one alone when left out.
    """
    tensors, names = list(problem.inputs.values()), list(problem.inputs)
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    incoming = output_gradients(problem, outputs)
    outputs, grads = testing.grads_of(problem.ours(backend), tensors, incoming)
    for _ in range(repeats):
        again = testing.grads_of(problem.ours(backend), tensors, incoming)
        testing.assert_bitwise_equal(sum(again, ()), outputs + grads)
    for group in wanted or [(name,) for name in names]:
        leaves = [
            t.detach().requires_grad_(n in group) for n, t in zip(names, tensors, strict=True)
        ]
        problem.ours(backend)(*leaves).backward(incoming[0])
        assert [n for n, leaf in zip(names, leaves, strict=True) if leaf.grad is not None] == [
            n for n in names if n in group
        ]
        for leaf, full in zip(leaves, grads, strict=True):
            if leaf.grad is not None:
                testing.assert_bitwise_equal(leaf.grad, full)


def _freeze(problem: Problem, wanted):
    """testing.grads_of, with gradients only for the `wanted` inputs."""
    if wanted is None:
        return testing.grads_of

    def run(function, tensors, grads):
        names = list(problem.inputs)
        chosen = [i for i, name in enumerate(names) if name in wanted]

        def call(*picked):
            full = list(tensors)
            for i, tensor in zip(chosen, picked, strict=True):
                full[i] = tensor
            return function(*full)

        outputs, partial = testing.grads_of(call, [tensors[i] for i in chosen], grads)
        every = [None] * len(names)
        for i, grad in zip(chosen, partial, strict=True):
            every[i] = grad
        return outputs, every

    return run


def philox_keep_mask(seed: int, shape: tuple[int, ...], p: float) -> torch.Tensor:
    """Dropout's keep mask, written a second time: Philox4x32-10 on Python integers."""
    low = 0xFFFFFFFF
    kept = []
    for index in range(math.prod(shape)):
        c0, c1, c2, c3 = index & low, index >> 32, 0, 0
        k0, k1 = seed & low, seed >> 32
        for _ in range(10):
            a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
            k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
        kept.append(c0 >= round(p * 2**32))
    return torch.tensor(kept).view(shape)


def backend_and_dtype(backends, dtypes, name="dtype"):
    """Parametrizes both; Triton's interpreter computes 16-bit products in fp32, so fp32 only."""
    pairs = [
        pytest.param(backend, dtype, id=f"{backend}-{INPUT_DTYPE_IDS[dtype]}")
        for backend in backends
        for dtype in dtypes
        if backend != "triton" or dtype not in SIXTEEN_BIT
    ]
    return pytest.mark.parametrize(("backend", name), pairs)


def lowest_precision(*dtypes) -> torch.dtype:
    return next((d for d in SIXTEEN_BIT if d in dtypes), torch.float32)
