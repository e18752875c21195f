"""window_attention: memory layouts, missing gradients, what is saved, what may be touched."""

import itertools
import re

import pytest
import torch
from problems import DTYPE_IDS, backend_and_dtype, check
from window_attention_problems import MAP_LAYOUTS, window_problem

from vitkernels.ops import window_attention
from vitkernels.testing import LAYOUTS, available_for, grads_of, in_layout

BACKENDS = available_for("window_attention", D=32, N=49)
FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_pair = backend_and_dtype(BACKENDS, DTYPE_IDS)


def small(backend, dtype=FP32, **options):
    """Six windows of six tokens, shifted on both axes; one sample for the interpreter."""
    options = {"windows": (2, 3), "B": 2, "D": 24, "cosine": True} | options
    if backend == "triton":
        options |= {"windows": (1, 2), "D": 16, "heads": 1}
    return window_problem((2, 3), (1, 1), dtype, **options)


@each_pair
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layouts_of_inputs_and_gradients(backend, layout, dtype):
    for cosine in (False, True) if backend != "triton" else (False,):
        problem = small(backend, dtype, cosine=cosine)
        # Samples alike have errors alike, and these a mean.
        slack = 1.1 if layout == "expanded" else 1.0
        shape_class = f"window (2, 3) cosine {cosine}"
        check(problem, backend, shape_class=shape_class, layout=layout, slack=slack)


@each_pair
@pytest.mark.parametrize("layout", MAP_LAYOUTS)
def test_layouts_of_the_map(backend, layout, dtype):
    """As a convolution, a crop or a stride leaves it."""
    problem = small(backend, dtype)
    shape_class, incoming = "window (2, 3)", "contiguous"
    check(problem, backend, shape_class=shape_class, layout=layout, grad_layout=incoming)


@pytest.mark.parametrize("skip", range(1, 16))
@each_backend
def test_every_misalignment(backend, skip):
    if backend == "triton" and skip not in (1, 2, 7):
        return
    problem = small(backend, FP32 if backend == "triton" else BF16)
    check(problem, backend, shape_class="window (2, 3)", layout=f"misaligned_{skip}")


@each_pair
@pytest.mark.parametrize("layout", ["ones", *(name for name in LAYOUTS if name != "contiguous")])
def test_incoming_gradients(backend, layout, dtype):
    """`ones` is what .sum().backward() sends: one number, expanded with strides of 0."""
    if backend == "triton" and layout not in ("ones", "sliced", "transposed"):
        return
    check(small(backend, dtype), backend, shape_class="window (2, 3)", grad_layout=layout)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("name", ["bias_table", "logit_scale"])
@each_backend
def test_layouts_of_the_parameters(backend, name, layout):
    """A parameter alone out of line gives the bits of one in line."""
    if backend == "triton" and layout not in ("transposed", "expanded"):
        return
    problem = small(backend)
    laid = in_layout(problem.inputs[name], layout)
    strided = [laid if n == name else t for n, t in problem.inputs.items()]
    inline = [t.contiguous() for t in strided]
    out, grads = grads_of(problem.ours(backend), strided)
    expected, expected_grads = grads_of(problem.ours(backend), inline)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


@each_pair
def test_the_transposed_map(backend, dtype):
    """Rows and columns swapped, in the map, the window, the shift and the table."""
    problem = small(backend, dtype)
    qkv, table, logit_scale = problem.inputs.values()
    shift = problem.options["shift_size"]
    options = {"num_heads": problem.options["num_heads"], "logit_scale": logit_scale}

    def turned(t):
        return t.unflatten(0, (3, 5)).transpose(0, 1).flatten(0, 1)

    out = problem.ours(backend)(qkv, table, logit_scale)
    mine = window_attention(
        qkv.transpose(1, 2), turned(table), window_size=(3, 2), shift_size=shift[::-1],
        backend=backend, **options,
    )  # fmt: skip
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine.transpose(1, 2), out, rtol=eps, atol=eps)


# ---- Which gradients

INPUTS = ("qkv", "bias_table", "logit_scale")
SUBSETS = [w for size in (1, 2) for w in itertools.combinations(INPUTS, size)]


@each_pair
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_frozen_inputs(backend, wanted, dtype):
    """A frozen input gets no gradient, and the others' stay right."""
    shape_class = f"window (2, 3) grads {'+'.join(wanted)}"
    check(small(backend, dtype), backend, shape_class=shape_class, wanted=wanted)


@each_pair
@pytest.mark.parametrize("wanted", ["qkv", "bias_table"])
def test_frozen_inputs_without_cosines(backend, wanted, dtype):
    problem = small(backend, dtype, cosine=False, dropout_p=0.2)
    check(problem, backend, shape_class=f"window (2, 3) plain grads {wanted}", wanted=(wanted,))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_nothing_of_tokens_by_tokens_is_saved(backend):
    """Inputs, the output and one number for each query: what a training step holds."""
    problem = window_problem(4, 2, windows=(2, 2), cosine=True)
    tensors = [t.requires_grad_() for t in problem.inputs.values()]
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        out = problem.ours(backend)(*tensors)
    given = {t.data_ptr() for t in (*tensors, out)}
    others = [tuple(t.shape) for t in saved if t.data_ptr() not in given]
    assert others == [(2, 4, 4, 16)], "lse of two samples, four windows, four heads, 16 tokens"
    assert len(saved) == 5


@each_pair
def test_outputs_and_gradients_are_contiguous(backend, dtype):
    for layout in ("outer_transposed", "columns_first", "channels_first"):
        problem = small(backend, dtype).laid_out(layout)
        qkv, *parameters = problem.inputs.values()
        assert problem.ours(backend)(qkv, *parameters).is_contiguous()
        if backend == "torch":
            continue  # its gradient has the layout that autograd gives it
        leaf = qkv.detach().requires_grad_()
        function = problem.ours(backend)
        (dqkv,) = torch.autograd.grad(function(leaf, *parameters).float().sum(), leaf)
        assert dqkv.is_contiguous() and dqkv.dtype == dtype


@each_pair
def test_an_empty_batch(backend, dtype):
    """No samples: an empty result, and zero gradients of the parameters."""
    problem = small(backend, dtype, B=0)
    (out,), grads = grads_of(problem.ours(backend), list(problem.inputs.values()))
    qkv = problem.inputs["qkv"]
    assert out.shape == (*qkv.shape[:3], qkv.shape[3] // 3) and out.dtype == dtype
    assert grads[0].shape == qkv.shape
    for grad, parameter in zip(grads[1:], list(problem.inputs.values())[1:], strict=True):
        assert grad.shape == parameter.shape and not grad.any()


@each_backend
def test_an_int_is_both_sides_of_the_window(backend):
    problem = window_problem(4, 2, B=1, windows=(1, 2))
    tensors = list(problem.inputs.values())
    expected = problem.ours(backend)(*tensors)
    for size, shift in ((4, 2), ([4, 4], [2, 2]), ((4, 4), 2)):
        mine = problem.ours(backend, window_size=size, shift_size=shift)(*tensors)
        assert torch.equal(mine, expected)


@each_backend
def test_what_the_linear_wrote_and_what_the_projection_reads(backend):
    """Between two Linears, without a copy in either direction: gradients reach both."""
    torch.manual_seed(0)
    qkv, proj = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
    table = torch.nn.Parameter(torch.randn(15, 2))
    x = torch.randn(2, 4, 6, 32, requires_grad=True)

    def block(backend):
        options = {"window_size": (2, 3), "shift_size": 1, "num_heads": 2}
        y = proj(window_attention(qkv(x), table, **options, backend=backend))
        leaves = [x, table, *qkv.parameters(), *proj.parameters()]
        return y, *torch.autograd.grad(y.square().mean(), leaves)

    torch.testing.assert_close(block(backend), block("reference"), rtol=1e-4, atol=1e-6)


# ---- Which backend


def call(qkv, table, backend, **options):
    options = {"window_size": (2, 3), "num_heads": 2} | options
    return window_attention(qkv, table, **options, backend=backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("torch", "reference")])
@pytest.mark.parametrize(
    ("qkv", "table", "options", "reason"),
    [
        ((1, 2, 3, 6 * 130), (15, 2), {}, "head dims to 128, got 130"),
        ((1, 33, 32, 6), (65 * 63, 2), {"window_size": (33, 32)}, "to 1024 tokens, got 1056"),
        ((1, 2, 3, 6), (15, 2), {"dtype": torch.float64}, "got float64"),
    ],
    ids=["D", "tokens", "fp64"],
)
def test_a_refusal_says_why(backend, qkv, table, options, reason):
    """And auto takes a composition that serves any size."""
    dtype = options.get("dtype", FP32)
    options = {name: value for name, value in options.items() if name != "dtype"}
    tensors = torch.randn(qkv, dtype=dtype), torch.randn(table, dtype=dtype)
    prefix = rf"^window_attention: backend='{backend}' cannot serve this call: .*"
    with pytest.raises(ValueError, match=prefix + re.escape(reason)):
        call(*tensors, backend, **options)
    expected = call(*tensors, "reference", **options)
    torch.testing.assert_close(call(*tensors, None, **options), expected, rtol=1e-4, atol=1e-5)


def test_a_table_or_logit_scale_in_float64_is_no_kernels():
    qkv, table = torch.randn(1, 2, 3, 96), torch.randn(15, 2)
    for options in ({"table": table.double()}, {"logit_scale": torch.randn(2).double()}):
        given = options.pop("table", table)
        with pytest.raises(ValueError, match=r"cannot serve this call: .* got float64"):
            call(qkv, given, "cpu", **options)
        expected = call(qkv, given, "reference", **options)
        assert expected.dtype == FP32
        torch.testing.assert_close(call(qkv, given, None, **options), expected)
