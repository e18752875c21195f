"""Triton patch_merge_layer_norm through the interpreter: plans, blocks of rows, runs, wide rows.

Values are fp32 (the interpreter's 16-bit arithmetic is wrong), with smoke cases in 16 bits; the
operator's own tests compare the backend in every layout and option.
"""

import itertools
import os

import pytest
import torch
from triton_values import compare, double

from vitkernels import testing
from vitkernels.ops.patch_merge import reference

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this session runs kernels on a GPU", allow_module_level=True)

from vitkernels.ops.patch_merge import _triton as kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


# --- plans: no kernel runs -----------------------------------------------------------------------


def test_a_tile_holds_a_row_and_its_threads_a_bounded_share():
    for C in range(1, kernels.RESIDENT_COLUMNS // 4 + 1):
        block_r, block_c, num_warps = kernels.forward_plan(C)
        assert C <= block_c < max(5, 2 * C) and block_c & (block_c - 1) == 0
        assert 4 * block_r * block_c <= 512 * num_warps and num_warps in (1, 2, 4, 8)
        assert kernels._is_resident(C)
    assert not kernels._is_resident(kernels.RESIDENT_COLUMNS // 4 + 1)


def test_rows_are_cut_into_runs_that_cover_them_once():
    sizes = itertools.product((0, 1, 7, 196, 6272, 3_000_000), (1, 96, 384, 1000), (2, 132))
    for rows, C, processors in sizes:
        block_r, block_c, num_warps, run, programs = kernels.backward_plan(rows, C, processors)
        assert run % block_r == 0 and block_c >= C
        assert programs * run >= rows > (programs - 1) * run or rows == 0
        assert programs <= 16 * processors and 4 * block_r * block_c <= 256 * num_warps


# --- values --------------------------------------------------------------------------------------


def check(shape, *, what, dtype=FP32, affine=True, wanted=(True,) * 3, x=None):
    """Forward and backward of the raw operators against the specification in float64."""
    what = f"patch_merge_layer_norm {what}"
    B, H, W, C = shape
    x = torch.randn(shape).to(dtype) if x is None else x
    weight, bias = (torch.randn(4 * C).to(dtype) if affine else None for _ in range(2))
    dy = torch.randn(B, -(-H // 2), -(-W // 2), 4 * C).to(dtype)
    wanted = [wanted[0], *(w and affine for w in wanted[1:])]
    ours = kernels.patch_merge_layer_norm_fwd(x, weight, bias, 1e-5, dtype)
    base = reference.patch_merge_layer_norm_fwd(x, weight, bias, 1e-5, dtype)
    exact = reference.patch_merge_layer_norm_fwd(*double(x, weight, bias), 1e-5, torch.float64)
    mine = kernels.patch_merge_layer_norm_bwd(dy, x, *ours[1:], weight, bias, wanted)
    peer = reference.patch_merge_layer_norm_bwd(dy, x, *base[1:], weight, bias, wanted)
    truth = reference.patch_merge_layer_norm_bwd(
        *double(dy, x), *exact[1:], *double(weight, bias), wanted
    )
    if dtype == FP32:
        compare(ours, base, exact, what)
        compare(mine, peer, truth, what + " backward")
        return
    for outputs in ((ours[0], base[0], exact[0]), *zip(mine, peer, truth, strict=True)):
        testing.assert_close_to_truth(*outputs, dtype=dtype, what=what, truncating_stores=True)


@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 31, 32, 33, 64, 65, 100, 128, 129, 255, 257])
def test_channels_around_every_block(C):
    check((2, 3, 4, C), what=f"C={C}")


@pytest.mark.parametrize("C", [1, 16, 130])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (2, 2), (9, 8), (8, 11)], ids=str)
def test_more_rows_than_a_block_holds(size, C):
    check((3, *size, C), what=f"{size} C={C}")


@pytest.mark.parametrize("processors", [1, 2, 5])
def test_more_programs_than_rows_and_fewer(monkeypatch, processors):
    """Runs of one block and of many, the last one not full."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: processors)
    for shape in ((1, 2, 2, 256), (2, 13, 9, 40)):
        check(shape, what=f"{shape} {processors} processors")


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("size", [(4, 6), (3, 5)], ids=str)
def test_wide_rows_take_the_kernels_of_add_layer_norm(monkeypatch, size, affine):
    monkeypatch.setattr(kernels, "RESIDENT_COLUMNS", 64)
    check((2, *size, 20), what=f"wide {size} affine {affine}", affine=affine)


def test_a_row_that_is_wide():
    check((1, 1, 2, 1025), what="C=1025")


@pytest.mark.parametrize("mask", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("C", [16, 24])
def test_every_output_mask(monkeypatch, C, mask):
    monkeypatch.setattr(kernels, "RESIDENT_COLUMNS", 64)
    if any(mask):
        check((1, 3, 2, C), what=f"C={C} wanted {mask}", wanted=mask)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_sixteen_bits(dtype):
    check((2, 5, 4, 24), what=f"{dtype}", dtype=dtype)


def test_x_is_read_through_its_strides():
    x = torch.randn(2, 24, 7, 5).permute(0, 2, 3, 1)
    check((2, 7, 5, 24), what="channels first", x=x)
    check((2, 7, 5, 24), what="one pixel", x=x[:, :1, :1].expand(2, 7, 5, 24))
