"""Triton window_attention through the interpreter: windows, seams, runs, passes, every gradient.

Values are fp32 (the interpreter's 16-bit arithmetic is wrong), with a 16-bit smoke case of every
kernel; `what` names the case.
"""

import itertools
import math
import os

import pytest
import torch
from triton_values import compare, double

from vitkernels import testing
from vitkernels.ops.window_attention import reference
from vitkernels.testing import in_layout

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this session runs kernels on a GPU", allow_module_level=True)

from vitkernels.ops.window_attention import _triton as kernels
from vitkernels.ops.window_attention import _triton_backward as backward
from vitkernels.ops.window_attention import _triton_dbias as dbias
from vitkernels.ops.window_attention import _triton_forward as forward
from vitkernels.ops.window_attention import _triton_plans as plans
from vitkernels.ops.window_attention import _triton_tiles as tiles

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor([1234567890123])


# --- plans: no kernel runs -----------------------------------------------------------------------


@pytest.mark.parametrize("on_gpu", [False, True], ids=["interpreter", "gpu"])
def test_tiles_cover_every_window(monkeypatch, on_gpu):
    monkeypatch.setattr(plans, "INTERPRETED", not on_gpu)
    for N, D, dtype in itertools.product(range(1, 1025), (1, 32, 96, 128), (FP32, BF16)):
        for plan in (plans.forward_plan(N, D, dtype), plans.backward_plan(N, D, dtype)):
            assert plan.main % plan.block_loop == 0 and plan.main < N <= plan.width, plan
            assert plan.width - N < max(16, plan.tail // 2), plan
            assert plan.dim >= D and plan.num_warps in (1, 2, 4, 8), plan
            powers = (plan.block, plan.block_loop, plan.tail, plan.dim)
            assert all(p >= 16 and p & (p - 1) == 0 for p in powers), plan
            assert plan.holds(N) == (plan.blocks(N) == 1 and plan.main == 0), plan


def test_sixteen_bits_take_a_window_to_64_tokens_at_once(monkeypatch):
    monkeypatch.setattr(plans, "INTERPRETED", False)
    for N in range(1, 65):
        plan = plans.backward_plan(N, 32, BF16)
        assert plan.holds(N) and plan == plans.forward_plan(N, 32, BF16) and plans.one_pass(plan, N)
    assert not plans.one_pass(plans.backward_plan(49, 128, BF16), 49)
    assert not plans.forward_plan(65, 32, BF16).holds(65)


def test_padding_of_the_keys_of_real_windows(monkeypatch):
    monkeypatch.setattr(plans, "INTERPRETED", False)
    widths = {N: plans.forward_plan(N, 32, BF16).width for N in (49, 64, 81, 144, 196, 256, 576)}
    assert widths == {49: 64, 64: 64, 81: 96, 144: 144, 196: 208, 256: 256, 576: 576}


def test_windows_are_cut_into_programs_that_leave_no_multiprocessor_idle():
    assert plans.windows_per_program(4096, 3, 132, backward=False) == plans.MOST_WINDOWS
    assert plans.windows_per_program(8, 24, 132, backward=False) == 1
    for windows, heads, processors in itertools.product(
        (1, 7, 64, 4096), (1, 3, 24, 500), (2, 132)
    ):
        runs = plans.windows_per_program(windows, heads, processors, backward=True)
        assert 1 <= runs <= windows
        assert -(-windows // runs) * heads <= max(heads, 3 * processors)
        assert (
            1 <= plans.dbias_splits(heads, windows, processors) <= min(windows, plans.MOST_SPLITS)
        )


# --- values --------------------------------------------------------------------------------------


def make(window=(3, 4), windows=(2, 2), B=1, heads=2, D=16, cosine=False, dropout=False):
    """(qkv, bias_table, logit_scale, seed)."""
    (Wh, Ww), (rows, columns) = window, windows
    return [
        torch.randn(B, rows * Wh, columns * Ww, 3 * heads * D),
        torch.randn((2 * Wh - 1) * (2 * Ww - 1), heads),
        math.log(10.0) + 0.3 * torch.randn(heads) if cosine else None,
        SEED if dropout else None,
    ]


def options_of(arguments, window, shift, p=None):
    heads = arguments[1].shape[1]
    D = arguments[0].shape[3] // (3 * heads)
    p = (0.2 if arguments[3] is not None else 0.0) if p is None else p
    return (*window, *shift, heads, D**-0.5, p)


def slack_of(name, logit_scale):
    """A score of size L carries L eps into its probability, and the gradient of logit_scale is one
    long sum of them, where the yardstick's own error is a lottery."""
    if logit_scale is None:
        return 1.0
    largest = logit_scale.clamp(max=math.log(100.0)).exp().max().item()
    return max(1.0, 0.2 * largest) * (8.0 if name == "dlogit_scale" else 1.0)


def check(arguments, window, shift=(0, 0), *, what, dout=None, wanted=(True,) * 3, **label):
    """Forward and backward of the raw operators in fp32."""
    what = f"window_attention {what}"
    options = options_of(arguments, window, shift)
    wide = double(*arguments)
    ours = kernels.window_attention_fwd(*arguments, *options)
    base = reference.window_attention_fwd(*arguments, *options)
    exact = reference.window_attention_fwd(*wide, *options)
    compare(ours, base, exact, what, slack=slack_of("out", arguments[2]), **label)
    dout = torch.randn(ours[0].shape) if dout is None else dout
    qkv, *parameters = arguments
    wanted = [*wanted[:2], wanted[2] and parameters[1] is not None]
    mine = kernels.window_attention_bwd(dout, qkv, *ours, *parameters, *options, wanted)
    peer = reference.window_attention_bwd(dout, qkv, *base, *parameters, *options, wanted)
    saved = (dout.double(), wide[0], *exact, *wide[1:])
    truth = reference.window_attention_bwd(*saved, *options, wanted)
    for gradient, like in zip(mine, (qkv, *parameters[:2]), strict=True):
        assert gradient is None or (gradient.dtype, gradient.shape) == (like.dtype, like.shape)
        assert gradient is None or gradient.is_contiguous()
    # One token in a window: every score's gradient is 0, judged beside dv.
    alone = math.prod(window) == 1
    groups = ("dqkv", "dbias_table", "dlogit_scale") if not alone else ("everything",)
    for n, name in enumerate(groups):
        some = slice(n, None if alone else n + 1)
        compare(
            mine[some], peer[some], truth[some], f"{what} backward {name}",
            slack=slack_of(name, parameters[1]), **label,
        )  # fmt: skip
    return ours, mine


KINDS = pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
SMALL = [(1, 1), (2, 3), (4, 4), (5, 3), (1, 7), (16, 2), (7, 7), (8, 8)]


@KINDS
@pytest.mark.parametrize("window", SMALL, ids=str)
def test_windows_that_are_one_tile(window, cosine):
    """With a shift on no axis, both, and each one."""
    shifts = [(window[0] // 2, window[1] // 2), (window[0] - 1, 0), (0, window[1] - 1), (0, 0)]
    for shift in dict.fromkeys(shifts[cosine:3:2] if math.prod(window) > 16 else shifts):
        arguments = make(window, heads=1, cosine=cosine)
        check(arguments, window, shift, what=f"{window} shift {shift} cosine {cosine}")


LARGE = [
    ((9, 9), (4, 4), True, True), ((12, 12), (6, 6), False, True), ((6, 11), (5, 10), True, False),
    ((16, 5), (8, 0), False, False), ((1, 70), (0, 64), False, True), ((2, 35), (1, 0), True, True),
]  # fmt: skip


@pytest.mark.parametrize(("window", "shift", "cosine", "dropout"), LARGE, ids=str)
def test_windows_in_blocks(window, shift, cosine, dropout):
    arguments = make(window, (1, 2), heads=1, cosine=cosine, dropout=dropout)
    what = f"{window} shift {shift} cosine {cosine} dropout {dropout}"
    check(arguments, window, shift, what=what)


@KINDS
@pytest.mark.parametrize("window", [(3, 4), (5, 5)], ids=str)
def test_tiles_of_the_fp32_kernels_on_a_gpu(monkeypatch, window, cosine):
    """The interpreter otherwise runs fp32 in the tiles meant for 16 bits."""
    monkeypatch.setattr(plans, "INTERPRETED", False)
    arguments = make(window, (1, 2), heads=1, cosine=cosine)
    check(arguments, window, (1, 2), what=f"fp32 tiles {window} cosine {cosine}")


@KINDS
@pytest.mark.parametrize("D", [1, 3, 17, 32, 64, 72, 128])
def test_head_dims(D, cosine):
    if D == 1 and cosine:
        return  # +-1: no length is left to differentiate, only its rounding errors
    arguments = make((2, 3), heads=1, D=D, cosine=cosine, dropout=D == 32)
    check(arguments, (2, 3), (1, 1), what=f"D={D} cosine {cosine}")


@pytest.mark.parametrize("windows", [(1, 1), (1, 3), (3, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, 2), (2, 3)], ids=str)
def test_every_kind_of_window_in_runs(monkeypatch, shift, windows):
    """Interior, last column, last row, corner; runs of windows that end within a kind."""
    run = sum(windows) + sum(shift)
    for module in (forward, backward):
        monkeypatch.setattr(module, "windows_per_program", lambda *_, **__: 1 + run % 4)
    arguments = make((3, 4), windows, B=2, heads=1, dropout=shift == (2, 3))
    check(arguments, (3, 4), shift, what=f"kinds shift {shift} of {windows}")


def test_the_programs_of_a_head_are_what_the_kernel_counts():
    """More than those would have no window, fewer would leave some out."""
    for B, rows, columns, shift, run in itertools.product(
        (1, 3), (1, 4), (1, 5), ((0, 0), (1, 0), (0, 1), (1, 1)), (1, 4, 100)
    ):
        interior = (rows - shift[0]) * (columns - shift[1])
        last_row = shift[0] * (columns - shift[1])
        last_column = shift[1] * (rows - shift[0])
        counts = (interior, last_row, last_column, shift[0] * shift[1])
        expected = sum(math.ceil(B * count / run) for count in counts)
        assert plans.programs_of_a_head(B, rows, columns, shift, run) == expected


def test_bias_gradient_of_blocks_in_one_run_and_in_several(monkeypatch):
    for splits in (1, 2):
        monkeypatch.setattr(dbias, "dbias_splits", lambda *_, n=splits: n)
        arguments = make((5, 13), (1, 3), heads=1, cosine=splits == 2)
        check(arguments, (5, 13), (2, 6), what=f"bias in {splits} runs")


LAYOUTS = [name for name in testing.LAYOUTS if name != "contiguous"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_tensor(layout):
    *tensors, _ = make(cosine=True)
    tensors = [in_layout(t, layout) for t in tensors]
    dout = in_layout(torch.randn(1, 6, 8, 32), layout)
    with testing.unchanged(*tensors, dout):
        check([*tensors, None], (3, 4), (1, 2), dout=dout, what="strides", layout=layout)


@pytest.mark.parametrize("window", [(3, 4), (6, 11)], ids=str)
def test_maps_that_lie_apart(window):
    """Channels first, columns first, and inside of a larger map."""
    qkv, *parameters = make(window, (1, 2), heads=1)
    larger = torch.full([2 * n + 3 for n in qkv.shape[1:3]], math.nan)[None, :, :, None]
    larger = larger.repeat(1, 1, 1, qkv.shape[3])
    H, W = qkv.shape[1:3]
    views = {
        "channels first": qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "columns first": qkv.transpose(1, 2).contiguous().transpose(1, 2),
        "pixels apart": larger[:, 1 : 2 * H + 1 : 2, 2 : 2 * W + 2 : 2].copy_(qkv),
    }
    for name, view in views.items():
        check([view, *parameters], window, (1, 2), what=f"{window} map", layout=name)


def test_gradient_of_a_sum_is_expanded():
    ones = torch.ones(()).expand(1, 6, 8, 32)
    check(make(), (3, 4), (1, 2), dout=ones, what="ones", layout="incoming ones")


@pytest.mark.parametrize("window", [(2, 3), (5, 13)], ids=str)
@pytest.mark.parametrize("wanted", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_only_the_gradients_asked_for(wanted, window):
    wanted = tuple(map(bool, wanted))
    arguments = make(window, (1, 2), heads=1, cosine=True)
    check(arguments, window, (1, 2), wanted=wanted, what=f"{window} wants {wanted}")


def test_the_factor_of_cosines_ends_at_100():
    above = math.log(100.0) + 0.1
    arguments = make(heads=3, cosine=True)
    arguments[2] = torch.tensor([above, 1.0, above])
    _, (_, _, dscale) = check(arguments, (3, 4), (1, 2), what="factor of 100")
    assert [bool(g) for g in dscale] == [False, True, False]


@pytest.mark.parametrize("window", [(2, 3), (5, 13)], ids=str)
def test_vectors_too_short_to_have_a_direction(window):
    arguments = make(window, (1, 2), heads=1, cosine=True)
    arguments[0][0, 0, 0, :32] = 0.0  # q and k
    arguments[0][0, 0, 1, :16] = 1e-14
    arguments[0][0, 1, 1, 16:32] = 1e-14
    _, (dqkv, _, _) = check(arguments, window, what=f"{window} short vectors")
    assert not dqkv[0, 0, 0, :32].any() and not dqkv[0, 0, 1, :16].any()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("window", [(3, 4), (5, 13)], ids=str)
@KINDS
def test_sixteen_bit_smoke(window, cosine, dtype):
    arguments = make(window, (1, 2), heads=1, cosine=cosine)
    arguments[0] = arguments[0].to(dtype)
    options = options_of(arguments, window, (1, 2))
    qkv, *parameters = arguments
    ours = kernels.window_attention_fwd(*arguments, *options)
    exact = reference.window_attention_fwd(*double(*arguments), *options)
    dout, wanted = torch.randn_like(ours[0]), [True, True, cosine]
    grads = kernels.window_attention_bwd(dout, qkv, *ours, *parameters, *options, wanted)
    saved = double(dout, qkv, *exact, *parameters)
    truths = reference.window_attention_bwd(*saved, *options, wanted)
    names = ("out", "lse", "dqkv", "dbias_table", "dlogit_scale")
    for name, mine, truth in zip(names, (*ours, *grads), (*exact, *truths), strict=True):
        if truth is None:
            continue
        assert mine.dtype == (dtype if name in ("out", "dqkv") else FP32), name
        error = (mine.double() - truth).abs().max()
        # From `out` of 16 bits the delta of large windows carries its rounding into every row.
        assert error <= 8 * torch.finfo(dtype).eps * truth.abs().max(), f"{name}: {error}"
    label = "bf16" if dtype == BF16 else "fp16"
    what = f"smoke {window} cosine {cosine}"
    testing.cases.record("window_attention", "triton", label, what, "contiguous")


@pytest.mark.parametrize("dtypes", [(BF16, FP16), (FP16, BF16), (FP32, BF16)], ids=str)
def test_parameters_have_their_own_dtypes(dtypes):
    qkv, table, logit_scale, seed = make(cosine=True)
    arguments = [qkv, table.to(dtypes[0]), logit_scale.to(dtypes[1]).reshape(2, 1, 1), seed]
    options = options_of(arguments, (3, 4), (1, 2))
    ours = kernels.window_attention_fwd(*arguments, *options)
    exact = reference.window_attention_fwd(*double(*arguments), *options)
    narrow = [t if t is None else t.float() for t in arguments]
    base = reference.window_attention_fwd(*narrow, *options)
    compare(ours, base, exact, f"window_attention parameters {dtypes}", slack=4.0)
    dout = torch.randn_like(ours[0])
    grads = kernels.window_attention_bwd(dout, qkv, *ours, *arguments[1:], *options, [True] * 3)
    saved = double(dout, qkv, *exact, *arguments[1:])
    truths = reference.window_attention_bwd(*saved, *options, [True] * 3)
    for mine, truth, like in zip(grads, truths, arguments, strict=False):
        assert (mine.dtype, mine.shape) == (like.dtype, like.shape)
        limit = 2 * torch.finfo(mine.dtype).eps * truth.abs().max() + 1e-5
        assert (mine.double() - truth).abs().max() <= limit


@pytest.mark.parametrize("window", [(2, 3), (5, 13)], ids=str)
def test_no_maps(window):
    arguments = make(window, B=0, cosine=True)
    options = options_of(arguments, window, (1, 2))
    qkv, *parameters = arguments
    out, lse = kernels.window_attention_fwd(*arguments, *options)
    assert out.shape[0] == lse.shape[0] == 0
    grads = kernels.window_attention_bwd(out, qkv, out, lse, *parameters, *options, [True] * 3)
    for gradient, like in zip(grads, arguments, strict=False):
        assert gradient.shape == like.shape and not gradient.any()


def test_the_bias_is_minus_infinity_where_a_seam_or_padding_lies():
    table = torch.randn(15, 2)
    bias = tiles.expand_bias(table, (2, 3), 16, 16, shift=(1, 2))
    exact = reference.position_bias(table, (2, 3)) / math.log(2)
    apart = reference.seams((1, 4, 6), (2, 3), (1, 2))
    torch.testing.assert_close(bias[:, :, :6, :6].isneginf(), apart[:, None].expand(4, 2, 6, 6))
    torch.testing.assert_close(bias[0, :, :6, :6], exact)
    assert bias[..., 6:].isneginf().all() and not bias[:, :, 6:, :6].any()
    plain = tiles.expand_bias(table, (2, 3), 16, 16, transposed=True)
    torch.testing.assert_close(plain[0, :, :6, :6], exact.mT)
    assert plain[0, :, 6:].isneginf().all() and not plain[0, :, :6, 6:].any()


@pytest.mark.parametrize(("window", "windows"), [((3, 4), (2, 2)), ((5, 13), (1, 2))], ids=str)
def test_the_same_bits_every_time_and_none_left_unwritten(window, windows):
    arguments = make(window, windows, heads=1, cosine=True, dropout=True)
    options = options_of(arguments, window, (1, 2))
    qkv, *parameters = arguments
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        first, dout = None, torch.randn(*qkv.shape[:3], 16)
        for _ in range(2):
            saved = kernels.window_attention_fwd(*arguments, *options)
            grads = kernels.window_attention_bwd(
                dout, qkv, *saved, *parameters, *options, [True] * 3
            )
            first = first or (*saved, *grads)
            testing.assert_bitwise_equal(first, (*saved, *grads))
            assert not any(t.isnan().any() for t in first)
    finally:
        torch.use_deterministic_algorithms(False)
