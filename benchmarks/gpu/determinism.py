"""Part determinism: repeats, side streams, CUDA graphs, and tensors of more than 2^31 elements.

Every case compares bits, so it needs no truth.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from gpu_cases import kernels

from vitkernels import _native, testing
from vitkernels.evidence.contest import problem, run_once
from vitkernels.evidence.outcome import NOT_RUN, Outcome
from vitkernels.evidence.shapes import MODULES, ROWS
from vitkernels.evidence.subject import BOTH, FORWARD

REPEATS = {"cuda": 250, "cpu": 3}
BATCH = 4
DTYPE = torch.bfloat16
KINDS = ("repeats", "side-stream", "graph-forward", "graph-both", "large")
# operator -> shape with more than 2^31 elements in its largest tensor. DropPath keeps the last rows
# of the LayerNorms, as it keeps the first ones.
LARGE = {
    "add_layer_norm": (2**31 // 1024 + 6, 1, 1024),
    "layer_norm_add": (2**31 // 1024 + 6, 1, 1024),
    "attention": (14250, 197, 12, 64),
    "attention_qkvpacked": (4752, 197, 12, 64),
    "window_attention": (2384, 56, 56, 3, 32),
    "patch_embed": (14272, 3, 224, 224, 16, 768),
    "patch_merge_layer_norm": (7144, 56, 56, 96),
    "linear_gelu": (700_000, 384, 3072),
    "linear": (700_000, 384, 3072),
    "distillation_loss": (2**22, 520),
}
LAST = 2  # samples (rows of a Linear: more) at the end that are compared with a call of their own
CERTAIN = 512.0  # a logit beside zeros whose softmax is exactly 1, in any dtype


def names(device: str) -> list[str]:
    return [
        f"{op} {backend}{':' * bool(path)}{path} {kind}"
        for kind in KINDS
        for op in MODULES
        for backend, path in kernels(op)
    ]


def facts_of(name: str) -> dict:
    op, kernel, _ = name.split()
    backend, _, path = kernel.partition(":")
    return {"op": op, "backend": backend, "path": path}


def run(name: str, device: str) -> Outcome | dict:
    op, kernel, kind = name.split()
    backend, _, path = kernel.partition(":")
    missing = _native.missing[backend]
    if missing is not None:
        return Outcome(NOT_RUN, missing)
    if device != "cuda" and kind != "repeats":
        return Outcome(NOT_RUN, "it needs an NVIDIA GPU")
    row = next(row for row in ROWS if row.op == op)
    with testing.cuda_path(path) if path else contextlib.nullcontext():
        if kind == "large":
            large = large_loss if op == "distillation_loss" else _large
            return large(op, row, backend)
        subject = row.subject(device, small=device != "cuda", batch=BATCH)
        direction = FORWARD if kind == "graph-forward" else BOTH
        inputs, grads = problem(subject, 0, DTYPE, direction, torch.device(device))
        function = subject.ours(backend)
        first = run_once(function, inputs, grads)
        {"repeats": _repeats, "side-stream": _side_stream}.get(kind, _graph)(
            function, inputs, grads, first, name
        )
    return {}


def _repeats(function, inputs, grads, first, name) -> None:
    for i in range(REPEATS[inputs[0].device.type]):
        again = run_once(function, inputs, grads)
        testing.assert_bitwise_equal(first, again, f"{name}: repeat {i + 1}")


def _side_stream(function, inputs, grads, first, name) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_the_side = run_once(function, inputs, grads)
    torch.cuda.current_stream().wait_stream(stream)
    testing.assert_bitwise_equal(first, on_the_side, name)


def _graph(function, inputs, grads, first, name) -> None:
    """Captured after a warm-up on a side stream, as torch's documentation asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run_once(function, inputs, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_once(function, inputs, grads)
    for _ in range(2):
        with torch.no_grad():
            for tensor in captured:
                tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        testing.assert_bitwise_equal(first, captured, name)


def _large(op, row, backend) -> dict:
    """The last samples of a call beyond 2^31 elements equal a call of theirs alone."""
    torch.cuda.empty_cache()  # tens of GB are needed in one piece
    last = LAST * 197 if op.startswith("linear") else LAST
    tail = _resized(row, (last, *LARGE[op][1:]))
    inputs, _ = problem(tail, 0, DTYPE, FORWARD, torch.device("cuda"))
    whole = [
        _at_the_end(t, LARGE[op][0]) if t.ndim > 1 and t.shape[0] == last else t for t in inputs
    ]
    largest = max(t.numel() for t in whole)
    subject = _resized(row, LARGE[op])
    alone = run_once(tail.ours(backend), inputs, [])
    together = run_once(subject.ours(backend), whole, [])
    largest = max(largest, *(t.numel() for t in together))
    assert largest > 2**31, f"{op}: only {largest} elements"
    ends = [t[-last:] for t in together]
    testing.assert_bitwise_equal(alone, ends, f"{op} {backend} beyond 2^31 elements")
    return {"elements": largest}


def large_loss(op, row, backend, device="cuda") -> dict:
    """A scalar has no last samples. All rows before them are sure of the right class, in student
    and teacher: they add exactly 0 to the loss and have no gradient. So loss and gradients are
    those of the last rows alone, but for the mean's divisor; both batches are powers of two, and
    the quotient of the divisors changes no bit but the exponent."""
    rows, K = LARGE[op]
    tail, whole = (_resized(row, (n, K), device) for n in (LAST, rows))
    inputs, grads = problem(tail, 0, DTYPE, BOTH, torch.device(device))
    alone = run_once(tail.ours(backend), inputs, grads)
    every = [_at_the_end(t.detach(), rows) for t in inputs]
    for tensor, of_tail in zip(every, inputs, strict=True):
        if tensor.is_floating_point():
            tensor[:-LAST, 0] = CERTAIN
        tensor.requires_grad_(of_tail.requires_grad)
    loss, *gradients = run_once(whole.ours(backend), every, grads)
    scale, what = rows // LAST, f"{op} {backend} beyond 2^31 elements"
    ends = [loss * scale, *(t[-LAST:] * scale for t in gradients)]
    testing.assert_bitwise_equal(alone, ends, what)
    for gradient in gradients:
        assert not gradient[:-LAST].any(), f"{what}: a gradient in rows that have none"
    return {"elements": every[0].numel()}


def _resized(row, shape, device="cuda"):
    return dataclasses.replace(row, shape=shape).subject(device)


def _at_the_end(tensor: torch.Tensor, n: int) -> torch.Tensor:
    whole = tensor.new_zeros((n, *tensor.shape[1:]))
    whole[-tensor.shape[0] :] = tensor
    return whole
