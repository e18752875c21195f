"""Triton linear_gelu through the interpreter: tiles, splits, strides, dtypes, every gradient.

Values are fp32 (the interpreter's 16-bit arithmetic is wrong), with one 16-bit smoke case for each
activation; `what` names the case.
"""

import itertools
import math
import os

import pytest
import torch
from triton_values import compare, double

from vitkernels import testing
from vitkernels.ops.linear_gelu import reference
from vitkernels.testing import in_layout

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this session runs kernels on a GPU", allow_module_level=True)

from vitkernels import _triton
from vitkernels.ops.linear_gelu import _triton as kernels
from vitkernels.ops.linear_gelu import _triton_backward as backward
from vitkernels.ops.linear_gelu import _triton_forward as forward

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("identity", "erf", "tanh", "quick")


# --- plans: no kernel runs -----------------------------------------------------------------------


def test_the_quickest_tile_follows_the_size_of_the_product():
    table = forward.SM90
    assert _triton.choose_tile(table, 50432, 3072, 132) == table[0]
    assert _triton.choose_tile(table, 197, 768, 132).m == 64
    assert forward.tiles_for(BF16, torch.device("cpu"), gelu=True) == table[1:]
    for M, N in itertools.product((1, 64, 197, 1576, 50432), (1, 96, 768, 3072)):
        times = [tile.time(M, N, 132) for tile in table]
        assert _triton.choose_tile(table, M, N, 132).time(M, N, 132) == min(times)


def test_splits_cover_a_long_sum_once_and_fill_the_machine():
    tile = forward.SM90[0]
    sizes = itertools.product((96, 768, 3072), (96, 768), (1, 63, 64, 65, 1576, 50432), (2, 132))
    for M, N, K, processors in sizes:
        splits, steps = _triton.reduction_splits(tile, M, N, K, processors)
        blocks = -(-K // tile.k)
        assert splits * steps >= blocks > (splits - 1) * steps, (M, N, K, splits, steps)
        assert splits <= 16
    splits, _ = _triton.reduction_splits(tile, 3072, 768, 50432, 132)
    tiles = 24 * 3 * splits
    assert tiles / 132 / math.ceil(tiles / 132) > 0.9, f"{splits} splits leave processors idle"


def test_rows_of_the_bias_gradient_are_cut_into_runs_that_cover_them_once():
    for rows, N, processors in itertools.product((1, 8, 9, 197, 50432), (1, 257, 3072), (2, 132)):
        block_r, _, per_program, programs = backward.dh_plan(rows, N, processors)
        assert per_program % block_r == 0 and per_program * programs >= rows
        assert rows > per_program * (programs - 1)


# --- values --------------------------------------------------------------------------------------


def make(lead, K, N, bias=True):
    x, weight = torch.randn(*lead, K), torch.randn(N, K) / math.sqrt(K)
    return x, weight, torch.randn(N) if bias else None, torch.randn(*lead, N)


def check(x, weight, bias, dy, activation, *, what, wanted=(True,) * 3, save=True, **label):
    """Forward and backward of the raw operators in fp32."""
    what = f"linear_gelu {NAMES[activation]} {what}"
    wanted = [*wanted[:2], wanted[2] and bias is not None]
    wide, narrow = double(x, weight, bias), [None if t is None else t.float() for t in (x, weight)]
    narrow.append(None if bias is None else bias.float())
    ours = kernels.linear_gelu_fwd(x, weight, bias, activation, save, FP32)
    base = reference.linear_gelu_fwd(*narrow, activation, save, FP32)
    exact = reference.linear_gelu_fwd(*wide, activation, save, torch.float64)
    compare(ours, base, exact, what, **label)
    mine = kernels.linear_gelu_bwd(dy, x, weight, bias, ours[1], activation, wanted)
    peer = reference.linear_gelu_bwd(dy, *narrow, base[1], activation, wanted)
    truth = reference.linear_gelu_bwd(dy.double(), *wide, exact[1], activation, wanted)
    for gradient, like in zip(mine, (x, weight, bias), strict=True):
        assert gradient is None or (gradient.dtype, gradient.shape) == (like.dtype, like.shape)
    widened = [None if g is None else g.float() for g in mine]
    if all(t is None or t.dtype == FP32 for t in (x, weight, bias)):
        compare(widened, peer, truth, what + " backward", **label)
    return ours, mine


SIZES = [
    (1, 1, 1), (5, 7, 9), (63, 64, 65), (64, 128, 64), (65, 63, 129), (130, 20, 70), (197, 33, 50),
    (3, 300, 2), (300, 5, 3), (2, 64, 300),
]  # fmt: skip


@pytest.mark.parametrize(("M", "K", "N"), SIZES)
@pytest.mark.parametrize("activation", range(4), ids=NAMES)
def test_odd_sizes(M, K, N, activation):
    check(*make((M,), K, N, bias=M != 65), activation, what=f"M={M} K={K} N={N}")


EVERY_TILE = [*forward.SM90, *forward.SM80, *forward.FP32]


@pytest.mark.parametrize("tile", EVERY_TILE, ids=lambda t: "x".join(map(str, t[:3])) + f"w{t[3]}")
def test_every_tile_with_more_tiles_than_programs(monkeypatch, tile):
    monkeypatch.setattr(forward, "tiles_for", lambda *_: (tile,))
    M, N = 2 * tile.m + 5, tile.n + 33
    check(*make((M,), 40, N), 3, what=f"tile {tile}")


def test_tiles_go_in_groups_of_rows_of_which_the_last_is_lower(monkeypatch):
    monkeypatch.setattr(forward, "tiles_for", lambda *_: (forward.SM90[-1],))
    check(*make((64 * 9 + 3,), 20, 130), 0, what="ten rows of tiles")


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_weight_gradient_in_one_piece_and_in_several(monkeypatch, splits):
    def cut(tile, M, N, K, processors):
        steps = -(-K // tile.k)
        per_split = -(-steps // splits)
        return -(-steps // per_split), per_split

    monkeypatch.setattr(forward, "reduction_splits", cut)
    check(*make((300,), 20, 30), 0, what=f"dweight in {splits} pieces")
    check(*make((320,), 20, 30), 0, what=f"dweight in {splits} even pieces")


@pytest.mark.parametrize("lead", [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(lead):
    check(*make(lead, 18, 20), 1, what=f"leading {lead}")


LAYOUTS = [name for name in testing.LAYOUTS if name != "contiguous"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [0, 1], ids=["identity", "erf"])
def test_layouts_of_every_input(layout, activation):
    """With the identity dy itself is an operand of both products."""
    tensors = [in_layout(t, layout) for t in make((3, 5), 18, 20)]
    with testing.unchanged(*tensors):
        check(*tensors, activation, what="strides", layout=layout)


@pytest.mark.parametrize("activation", [0, 2], ids=["identity", "tanh"])
def test_gradient_of_a_sum_is_expanded(activation):
    x, weight, bias, _ = make((3, 5), 18, 20)
    dy = torch.ones(()).expand(3, 5, 20)
    check(x, weight, bias, dy, activation, what="expanded dy", layout="incoming ones")


def test_preactivation_of_any_strides_and_three_levels_of_rows():
    x, weight, bias, dy = make((2, 3, 4), 18, 20)
    x = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    check(x, weight, bias, dy, 1, what="permuted rows", layout="permuted")
    _, h = kernels.linear_gelu_fwd(x, weight, bias, 1, True, FP32)
    apart = in_layout(h, "sliced").transpose(0, 1).contiguous().transpose(0, 1)
    masks = (1, [True] * 3)
    expected = kernels.linear_gelu_bwd(dy, x, weight, bias, h, *masks)
    for a, b in zip(
        expected, kernels.linear_gelu_bwd(dy, x, weight, bias, apart, *masks), strict=True
    ):
        assert torch.equal(a, b)


MIXES = [p for p in itertools.product((FP32, BF16, FP16), repeat=3) if len(set(p)) > 1][::2]


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_each_tensor_has_its_own_dtype(dtypes):
    x, weight, bias, dy = make((6,), 18, 20)
    x, weight, bias = (t.to(d) for t, d in zip((x, weight, bias), dtypes, strict=True))
    label = "+".join(str(t)[6:] for t in dtypes)
    _, grads = check(x, weight, bias, dy, 1, what="mixed dtypes", dtype=label)
    exact = reference.linear_gelu_bwd(*double(dy, x, weight, bias), None, 1, [True] * 3)
    for name, mine, truth in zip(("dx", "dweight", "dbias"), grads, exact, strict=True):
        limit = 2 * torch.finfo(mine.dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= limit, f"{name} {mine.dtype}"


@pytest.mark.parametrize("activation", range(4), ids=NAMES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_sixteen_bit_smoke(dtype, activation):
    x, weight, bias, dy = (t.to(dtype) for t in make((40,), 48, 70))
    y, h = kernels.linear_gelu_fwd(x, weight, bias.float(), activation, True, dtype)
    wide = double(x, weight, bias)
    exact, _ = reference.linear_gelu_fwd(*wide, activation, True, torch.float64)
    grads = kernels.linear_gelu_bwd(dy, x, weight, bias.float(), h, activation, [True] * 3)
    saved = None if h is None else h.double()
    truths = reference.linear_gelu_bwd(dy.double(), *wide, saved, activation, [True] * 3)
    names = ("y", "dx", "dweight", "dbias")
    for name, mine, truth in zip(names, (y, *grads), (exact, *truths), strict=True):
        assert mine.dtype == (FP32 if name == "dbias" else dtype), name
        error = (mine.double() - truth).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * truth.abs().max(), f"{name}: {error}"
    label = {"bf16": BF16, "fp16": FP16}
    short = next(k for k, v in label.items() if v == dtype)
    testing.cases.record("linear_gelu", "triton", short, f"smoke {activation}", "contiguous")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", [1, 2, 3], ids=NAMES[1:])
def test_recomputed_and_saved_preactivations_give_the_same_bits(dtype, activation):
    x, weight, bias, dy = (t.to(dtype) for t in make((70,), 33, 40))
    y, h = kernels.linear_gelu_fwd(x, weight, bias, activation, True, dtype)
    again, none = kernels.linear_gelu_fwd(x, weight, bias, activation, False, dtype)
    assert none is None and torch.equal(y, again)
    first, *others = (
        kernels.linear_gelu_bwd(dy, x, weight, bias, saved, activation, [True] * 3)
        for saved in (h, None, h, None)
    )
    for other in others:
        testing.assert_bitwise_equal(first, other)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_the_gradients_asked_for(wanted):
    check(*make((9,), 18, 20), 1, what=f"wants {wanted}", wanted=wanted)
    check(*make((9,), 18, 20), 0, what=f"wants {wanted}", wanted=wanted)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", range(4), ids=NAMES)
def test_special_values_go_where_the_specification_sends_them(activation):
    h = [0.0, -0.0, 1e-40, 30.0, -30.0, 1e4, -1e4, 1e20, -1e20, math.inf, -math.inf, math.nan]
    x = torch.tensor(h)[:, None]
    weight, dy = torch.ones(1, 1), torch.ones(len(h), 1)
    y, saved = kernels.linear_gelu_fwd(x, weight, None, activation, True, FP32)
    exact, wide = reference.linear_gelu_fwd(x.double(), weight.double(), None, activation, True,
                                            torch.float64)  # fmt: skip
    assert not testing.same_specials(y, exact, "y")
    finite = exact.isfinite()
    torch.testing.assert_close(y[finite].double(), exact[finite], rtol=1e-6, atol=1e-6)
    dx, _, _ = kernels.linear_gelu_bwd(dy, x, weight, None, saved, activation, [True, False, False])
    truth, _, _ = reference.linear_gelu_bwd(
        dy.double(), x.double(), weight.double(), None, wide, activation, [True, False, False]
    )
    assert not testing.same_specials(dx, truth, "dx")
    finite = truth.isfinite()
    torch.testing.assert_close(dx[finite].double(), truth[finite], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_rows(lead):
    x, weight, bias, dy = make(lead, 6, 5)
    y, h = kernels.linear_gelu_fwd(x, weight, bias, 1, True, FP32)
    assert y.shape == h.shape == (*lead, 5)
    dx, dweight, dbias = kernels.linear_gelu_bwd(dy, x, weight, bias, h, 1, [True] * 3)
    assert dx.shape == x.shape and not dweight.any() and not dbias.any()


def test_the_same_bits_every_time_and_none_left_unwritten():
    x, weight, bias, dy = make((300,), 20, 70)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        first = None
        for _ in range(3):
            y, h = kernels.linear_gelu_fwd(x, weight, bias, 1, True, FP32)
            every = (y, h, *kernels.linear_gelu_bwd(dy, x, weight, bias, h, 1, [True] * 3))
            first = first or every
            for a, b in zip(first, every, strict=True):
                assert not a.isnan().any()
                testing.assert_bitwise_equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)
