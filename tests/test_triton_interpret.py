"""What only the Triton kernels have: launch plans, splits into tiles, loops and partial sums.

Values run through Triton's interpreter in fp32 (its 16-bit arithmetic is wrong); the operators'
own tests compare the backend in every layout and option.
"""

import itertools
import os

import pytest
import torch
from triton_values import compare, double

from vitkernels.ops._random import keep_mask
from vitkernels.ops.add_layer_norm import reference as norm_reference
from vitkernels.ops.attention import reference as attention_reference

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this session runs kernels on a GPU", allow_module_level=True)

from vitkernels import _triton
from vitkernels.ops.add_layer_norm import _triton as norm
from vitkernels.ops.add_layer_norm import _triton_backward as norm_backward
from vitkernels.ops.add_layer_norm import _triton_forward as norm_forward
from vitkernels.ops.attention import _triton as attention
from vitkernels.ops.attention import _triton_plans as plans
from vitkernels.ops.attention import _triton_tiles as tiles

FP32, BF16 = torch.float32, torch.bfloat16


# --- plans: every length and head dim, no kernel runs -------------------------------------------


def test_columns_cover_every_length_with_little_padding():
    for n in range(1, 1601):
        for largest in (16, 32, 64, 128):
            columns = plans.split_columns(n, largest)
            assert sum(columns) >= n > sum(columns[:-1]), (n, columns)
            assert all(c >= 16 and c & (c - 1) == 0 and c <= largest for c in columns), columns
            assert sum(c < largest for c in columns) <= 3, columns
        padded = sum(plans.split_columns(n))
        assert padded - n < max(16, n // 3), (n, padded)


def test_head_dims_are_covered_by_one_or_two_tiles():
    for D in range(1, 257):
        dims = plans.split_dims(D)
        assert len(dims) in (1, 2) and sum(dims) >= D > sum(dims[:-1])
        assert all(d >= 16 and d & (d - 1) == 0 for d in dims)
    exact = {D: plans.split_dims(D) for D in (32, 48, 64, 80, 96, 128)}
    assert all(sum(dims) == D for D, dims in exact.items()), exact
    assert plans.split_dims(72) == (64, 16) and plans.split_dims(88) == (64, 32)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["interpreter", "gpu"])
def test_plans_cover_every_length(monkeypatch, on_gpu):
    monkeypatch.setattr(plans, "INTERPRETED", not on_gpu)
    for N, D, dtype in itertools.product(range(1, 1601), (64, 80, 128, 256), (FP32, BF16)):
        flags = list(itertools.product((False, True), repeat=3))
        made = [plans.forward_plan(N, D, dtype, plain) for plain in (False, True)]
        made += [
            plans.backward_plan(rows, N, D, dtype, resident=a, narrow=b, tensor_memory=c)
            for rows in (197, N)
            for a, b, c in flags
        ]
        for plan in made:
            assert plan.main % plan.block_loop == 0 and 0 <= plan.main < N, plan
            rest = N - plan.main
            assert sum(plan.parts) >= rest > sum(plan.parts[:-1]), plan
            assert plan.main == 0 or rest <= plan.block_loop, plan
            assert sum(plan.dims) >= D and plan.num_warps in (4, 8), plan


def test_useful_fraction_of_the_score_tiles_at_the_lengths_of_vision_models():
    """Rows are padded to 64 or 128; columns hardly: 208 for 197, 592 for 577."""
    floor = {197: 0.72, 198: 0.73, 256: 1.0, 257: 0.75, 577: 0.87, 1025: 0.86, 1370: 0.95}
    for N, least in floor.items():
        useful = plans.forward_plan(N, 64, BF16).useful(N, N)
        assert useful >= least, f"N={N}: {useful:.3f} of the score tile is useful"


def test_blocks_of_a_head_share_one_program_only_where_the_machine_stays_full():
    whole = plans.forward_plan(197, 64, BF16)
    assert plans.blocks_of_a_head(whole, 197, 256, 12, 132) == (1, 4)
    assert plans.blocks_of_a_head(whole, 197, 1, 12, 132) == (4, 1)
    long = plans.forward_plan(1025, 64, BF16)
    assert plans.blocks_of_a_head(long, 1025, 256, 12, 132) == (9, 1)
    for N, B, H in itertools.product((1, 64, 65, 197, 272), (0, 1, 3, 64, 1000), (1, 12)):
        groups, per_program = plans.blocks_of_a_head(whole, N, B, H, 132)
        blocks = -(-N // whole.block)
        assert groups * per_program >= blocks > (groups - 1) * per_program


def test_bias_sums_are_cut_into_at_most_sixteen_runs():
    assert plans.dbias_splits(tiles=48, items=256, processors=132) == 11
    assert plans.dbias_splits(tiles=1, items=4096, processors=132) == 16
    assert plans.dbias_splits(tiles=100000, items=64, processors=132) == 1
    assert plans.dbias_splits(tiles=4, items=0, processors=132) == 1


def test_rows_are_cut_into_runs_that_cover_them_once():
    for rows, C, processors in itertools.product(
        (0, 1, 7, 197, 50432, 3_000_000), (1, 96, 768, 4096, 8200), (2, 132)
    ):
        block_r, _, _, per_program, programs = norm_backward.backward_plan(rows, C, processors)
        assert per_program % block_r == 0
        assert programs * per_program >= rows > (programs - 1) * per_program or rows == 0
        assert programs <= 16 * processors or rows == 0
    for C in range(1, 9000):
        resident, block_r, block_c, num_warps = norm_forward.forward_plan(C)
        assert resident == (C <= norm_forward.RESIDENT_COLUMNS)
        assert not resident or C <= block_c < max(17, 2 * C)
        assert num_warps in (1, 2, 4, 8) and block_r * block_c <= 1024 * num_warps


# --- host helpers --------------------------------------------------------------------------------


def test_rows_of_any_layout_are_read_where_they_lie():
    base = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    views = {
        "contiguous": base,
        "tokens first": base.transpose(0, 1),
        "channels last": base.permute(0, 2, 3, 1),
        "every other": base[:, :, ::2, ::2],
        "expanded": torch.ones(()).expand(2, 3, 4, 5),
        "expanded rows": base[:1, :1].expand(2, 3, 4, 5),
        "three levels": base.permute(2, 1, 0, 3),
        "one row": base[0, 0, 0],
    }
    for name, view in views.items():
        inner, (seen, nothing), (strides, zeros) = _triton.collapse_rows(view, None)
        assert nothing is None and zeros == (0, 0, 0)
        shared = seen.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        assert shared == (name not in ("tokens first", "three levels")), name
        flat = view.reshape(-1, view.shape[-1])
        rows = torch.arange(flat.shape[0])
        start = rows // inner * strides[0] + rows % inner * strides[1]
        index = start[:, None] + torch.arange(flat.shape[1]) * strides[2] + seen.storage_offset()
        storage = torch.as_strided(seen, (seen.untyped_storage().nbytes() // 4,), (1,), 0)
        assert torch.equal(storage[index], flat), name


def test_heads_are_copied_only_when_channels_are_apart():
    packed = torch.zeros(2, 7, 3 * 2 * 16)
    q, k, v = packed.unflatten(2, (3, 2, 16)).unbind(2)
    seen = tiles.heads(q, k, v)
    assert all(a is b for a, b in zip(seen.tensors, (q, k, v), strict=True)) and seen.unit == 8
    apart = torch.zeros(2, 7, 16, 2).transpose(2, 3)
    assert tiles.heads(apart).tensors[0].is_contiguous()
    assert tiles.heads(torch.zeros(2, 7, 2, 9)).unit == 1


@pytest.mark.parametrize("p", [1e-10, 1e-9, 0.1, 0.5, 0.75, 0.999999])
def test_keep_mask_is_the_specified_one_bit_for_bit(p):
    seed = torch.tensor([0x3AB5_F0E1_D2C3_B4A5])
    x = torch.ones(2, 31, 40)
    _, z, _, _ = norm.add_layer_norm_fwd(
        x, torch.zeros_like(x), None, None, None, None, seed, p, 1e-6, FP32
    )
    assert torch.equal(z != 0, keep_mask(seed, (2, 31, 40), p))


# --- values --------------------------------------------------------------------------------------


def check_attention(
    Nq, Nk, D=16, B=1, H=1, bias=None, mask=False, p=0.0, wanted=(True,) * 4, what=""
):
    """Forward and backward of the raw operators; bias is a shape."""
    q, dout = torch.randn(B, Nq, H, D), torch.randn(B, Nq, H, D)
    k, v = torch.randn(B, Nk, H, D), torch.randn(B, Nk, H, D)
    bias = None if bias is None else torch.randn(bias)
    mask = torch.rand(B, Nk) > 0.6 if mask else None
    options = (mask, torch.tensor([1234567890123]) if p else None, D**-0.5, p)
    wanted = [*wanted[:3], wanted[3] and bias is not None]
    what = what or f"attention Nq={Nq} Nk={Nk} D={D}"

    out, lse = attention.attention_fwd(q, k, v, bias, *options)
    truth = attention_reference.attention_fwd(*double(q, k, v, bias), *options)
    base = attention_reference.attention_fwd(q, k, v, bias, *options)
    compare([out, lse], base, truth, what)
    ours = attention.attention_bwd(dout, q, k, v, out, lse, bias, *options, wanted)
    saved = double(dout, q, k, v, *truth, bias)
    exact = attention_reference.attention_bwd(*saved, *options, wanted)
    base = attention_reference.attention_bwd(dout, q, k, v, *base, bias, *options, wanted)
    # One bias for all keys changes nothing: its gradient is rounding alone, other terms' in each.
    one_for_all_keys = bias is not None and bias.shape[-1] == 1 < Nk
    compare(ours, base, exact, what + " backward", slack=2.0 if one_for_all_keys else 1.0)


def splits_and_lengths():
    """The shortest and the longest length of every static split of a whole row."""
    lengths: dict[tuple, list[int]] = {}
    for n in range(1, plans.WHOLE_ROW + 1):
        lengths.setdefault(plans.split_columns(n), []).append(n)
    return sorted({n for found in lengths.values() for n in (found[0], found[-1])})


@pytest.mark.parametrize("N", splits_and_lengths())
def test_every_split_of_a_row_on_either_side(N):
    check_attention(3, N)
    check_attention(N, 3)


@pytest.mark.parametrize(("Nq", "Nk"), [(20, 273), (20, 384), (20, 417), (150, 290), (385, 20)])
def test_long_loops_end_with_every_kind_of_rest(Nq, Nk):
    check_attention(Nq, Nk)


@pytest.mark.parametrize("D", [1, 16, 17, 48, 64, 72, 80, 88, 96, 104, 128, 160, 256])
def test_head_dims_that_are_split_or_padded(D):
    check_attention(5, 70, D)


@pytest.mark.parametrize("D", [64, 80])
def test_tiles_of_the_fp32_kernels_on_a_gpu(monkeypatch, D):
    """The interpreter otherwise runs fp32 in the tiles meant for 16 bits."""
    monkeypatch.setattr(plans, "INTERPRETED", False)
    check_attention(70, 75, D, what=f"attention fp32 tiles D={D}")


@pytest.mark.parametrize("shape", list(itertools.product((1, 3), (1, 2), (1, 40), (1, 70))))
def test_bias_gradient_sums_what_is_broadcast(shape):
    check_attention(40, 70, 16, B=3, H=2, bias=shape, what=f"attention bias {shape}")


def test_bias_gradient_in_one_run_and_in_several(monkeypatch):
    from vitkernels.ops.attention import _triton_dbias

    for splits in (1, 2, 5):
        monkeypatch.setattr(_triton_dbias, "dbias_splits", lambda *_, n=splits, **__: n)
        what = f"attention bias in {splits} runs"
        check_attention(5, 20, 16, B=5, H=1, bias=(1, 1, 5, 20), what=what)


@pytest.mark.parametrize("wanted", [w for w in itertools.product((0, 1), repeat=4) if any(w)])
def test_only_the_gradients_asked_for(wanted):
    wanted = tuple(map(bool, wanted))
    check_attention(18, 35, bias=(1, 1, 18, 35), wanted=wanted, what=f"attention wants {wanted}")


def test_options_together_over_loops():
    check_attention(
        70, 90, 24, B=1, H=2, bias=(1, 2, 70, 90), mask=True, p=0.3, what="attention options"
    )


def test_one_program_walks_over_all_blocks_of_many_heads():
    check_attention(140, 20, B=2, H=2, what="attention many heads")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bit_smoke(dtype):
    qkv, dout = torch.randn(1, 50, 96).to(dtype), torch.randn(1, 50, 32).to(dtype)
    bias = torch.randn(1, 2, 50, 50)
    options = (bias, None, None, 0.25, 0.0)
    ours = attention.attention_qkvpacked_fwd(qkv, 2, *options)
    truth = attention_reference.attention_qkvpacked_fwd(
        qkv.double(), 2, bias.double(), *options[1:]
    )
    grads = attention.attention_qkvpacked_bwd(dout, qkv, 2, *ours, *options, [True, True])
    exact = attention_reference.attention_qkvpacked_bwd(
        *double(dout, qkv), 2, *truth, bias.double(), *options[1:], [True, True]
    )
    for name, mine, other in zip(
        ("out", "lse", "dqkv", "dbias"), (*ours, *grads), (*truth, *exact), strict=True
    ):
        assert mine.dtype == (dtype if name in ("out", "dqkv") else FP32), name
        error = (mine.double() - other).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * other.abs().max(), f"{name}: {error}"


@pytest.mark.parametrize("C", [1, 4096, 4097, 8193])
def test_rows_at_the_edges_of_residence(C):
    check_norm((1, 2, C), p=0.0)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 300])
def test_runs_of_rows_and_their_partial_sums(rows):
    check_norm((1, rows, 48), p=0.1 if rows == 65 else 0.0)


def check_norm(shape, p):
    C = shape[-1]
    x, residual, dy, dnew = (torch.randn(shape) for _ in range(4))
    weight, bias, gamma = (torch.randn(C) for _ in range(3))
    row_scale = torch.full((shape[0],), 1.25)
    row_scale[-1] = 0.0 if shape[0] > 1 else 1.0
    seed = torch.tensor([987654321]) if p else None
    branch = (gamma, row_scale, seed, p)
    what = f"add_layer_norm {shape}"
    ours = norm.add_layer_norm_fwd(x, residual, weight, bias, *branch, 1e-5, FP32)
    wide = double(x, residual, weight, bias, *branch[:3])
    exact = norm_reference.add_layer_norm_fwd(*wide, p, 1e-5, torch.float64)
    base = norm_reference.add_layer_norm_fwd(x, residual, weight, bias, *branch, 1e-5, FP32)
    compare(ours, base, exact, what)
    saved = (dy, dnew, *exact[1:], x, weight, bias, *branch[:3])
    narrow = [t.float() if t is not None and t.is_floating_point() else t for t in saved]
    ours = norm.add_layer_norm_bwd(*narrow, p, FP32, [True] * 5)
    base = norm_reference.add_layer_norm_bwd(*narrow, p, FP32, [True] * 5)
    exact = norm_reference.add_layer_norm_bwd(*double(*narrow), p, torch.float64, [True] * 5)
    compare(ours[:2], base[:2], exact[:2], what + " backward")
    compare(ours[2:], base[2:], exact[2:], what + " parameters")

    ours = norm.layer_norm_add_fwd(x, residual, weight, bias, row_scale, 1e-5)
    wide = double(x, residual, weight, bias, row_scale)
    exact = norm_reference.layer_norm_add_fwd(*wide, 1e-5)
    base = norm_reference.layer_norm_add_fwd(x, residual, weight, bias, row_scale, 1e-5)
    compare(ours, base, exact, what.replace("add_layer_norm", "layer_norm_add"))


def test_the_same_bits_every_time():
    q, k, v, dout = (torch.randn(2, 70, 2, 16) for _ in range(4))
    bias = torch.randn(1, 2, 70, 70)
    x, weight = torch.randn(2, 70, 48), torch.randn(48)

    def once():
        saved = attention.attention_fwd(q, k, v, bias, None, None, 0.25, 0.0)
        options = (bias, None, None, 0.25, 0.0, [True] * 4)
        y, _, mean, rstd = norm.add_layer_norm_fwd(
            x, None, weight, weight, None, None, None, 0.0, 1e-6, FP32
        )
        grads = norm.add_layer_norm_bwd(
            y, None, x, mean, rstd, None, weight, weight, None, None, None, 0.0, FP32,
            [True, False, True, True, False],
        )  # fmt: skip
        return [*saved, *attention.attention_bwd(dout, q, k, v, *saved, *options), y, *grads]

    first = once()
    for _ in range(3):
        for a, b in zip(first, once(), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
