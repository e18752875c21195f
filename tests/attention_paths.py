"""What attention's CUDA kernels are asked: the forward alone, raw calls, one head at a time."""

from __future__ import annotations

import pytest
import torch
from compiled_code import disassembler
from native_build import NVCC
from problems import DTYPE_IDS, Problem

from vitkernels import testing
from vitkernels.ops.attention import reference
from vitkernels.testing import assert_bitwise_equal, assert_close_to_truth, available_for

needs_kernels = pytest.mark.skipif(
    "cuda" not in available_for("attention", D=64), reason="no CUDA kernels and no emulator"
)
needs_nvcc = pytest.mark.skipif(
    NVCC is None or disassembler() is None, reason="no nvcc or cuobjdump here"
)


def forward(problem: Problem) -> torch.Tensor:
    with torch.no_grad():
        return problem.ours("cuda")(*problem.inputs.values())


def check_forward(
    problem: Problem, what: str, layout: str, factor: float | None
) -> tuple[torch.Tensor, ...]:
    """The output within the error model, the inputs untouched. Returns ours, base and truth."""
    problem = problem.laid_out(layout)
    tensors = list(problem.inputs.values())
    with torch.no_grad(), testing.unchanged(*tensors):
        ours = forward(problem)
        base = problem.base()(*tensors)
        truth = problem.truth()(*problem.double().inputs.values())
    assert_close_to_truth(ours, base, truth, what=what, rmse_factor=factor)
    testing.cases.record(problem.op, "cuda", DTYPE_IDS[tensors[0].dtype], what, layout)
    return ours, base, truth


def check_specials(problem: Problem) -> None:
    """NaN and infinities of the output are where the truth has them."""
    exact = problem.truth()(*problem.double().inputs.values())
    assert testing.same_specials(forward(problem), exact) == ""


def check_heads_alone(problem: Problem) -> None:
    """A head sees nothing of another; neither heads nor the batch have a say in the bits."""
    q, k, v = problem.inputs.values()
    out = forward(problem)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            one = [t[b : b + 1, :, h : h + 1].contiguous() for t in (q, k, v)]
            assert_bitwise_equal(problem.ours("cuda")(*one), out[b : b + 1, :, h : h + 1])


def raw(q, k, v, bias=None, padding=None, scale=0.125):
    """(out, lse) without dropout."""
    return torch.ops.vitkernels.attention_fwd.cuda(q, k, v, bias, padding, None, scale, 0.0)


def check_raw(tensors, bias=None, padding=None, scale=0.125) -> None:
    """The output, and lse, which is fp32 on every backend, against the reference in float64."""
    out, lse = raw(*tensors, bias, padding, scale)
    wide = [t.double() for t in tensors]
    wide_bias = bias.double() if bias is not None and bias.is_floating_point() else bias
    truth, exact = reference.attention(*wide, wide_bias, padding, None, scale, 0.0)
    assert torch.equal(lse.isfinite(), exact.isfinite())
    there = exact.isfinite()
    assert (lse - exact)[there].abs().max() < 4e-6 * exact[there].abs().max()
    assert (out - truth).abs().max() < 0.02


def qkv(B, Nq, Nk, H=1, D=64, dtype=torch.bfloat16, seed=3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, N, H, D, generator=generator).to(dtype) for N in (Nq, Nk, Nk)]
