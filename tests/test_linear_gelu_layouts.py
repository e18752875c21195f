"""linear_gelu and linear: memory layouts, missing gradients, what is kept and what is touched."""

import itertools

import pytest
import torch
from linear_gelu_problems import APPROXIMATIONS, linear_gelu_problem, linear_problem
from problems import DTYPE_IDS, backend_and_dtype, check

from vitkernels.ops import linear, linear_gelu
from vitkernels.testing import LAYOUTS, assert_bitwise_equal, available_for, grads_of, in_layout

BACKENDS = available_for("linear_gelu")
FUNCTIONS = [b for b in BACKENDS if b != "torch"]  # one autograd.Function, whichever kernel
MAKERS = {"linear_gelu": linear_gelu_problem, "linear": linear_problem}
FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_function = pytest.mark.parametrize("backend", FUNCTIONS)
each_op = pytest.mark.parametrize("op", MAKERS)
NOT_CONTIGUOUS = [name for name in LAYOUTS if name != "contiguous"]


def small(op, backend, dtype, shape=(3, 7, 40), N=24, **options):
    """In the interpreter fp32 only."""
    return MAKERS[op](shape, N, FP32 if backend == "triton" else dtype, **options)


@pytest.mark.parametrize("layout", NOT_CONTIGUOUS)
@each_op
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_layouts_of_inputs_and_gradients(backend, op, layout, dtype):
    check(small(op, backend, dtype), backend, shape_class="K40 N24", layout=layout)


@pytest.mark.parametrize("skip", range(1, 16))
@each_op
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_every_misalignment(backend, op, skip):
    problem = small(op, backend, BF16, (2, 3, 48), 32)
    check(problem, backend, shape_class="K48 N32", layout=f"misaligned_{skip}")


@pytest.mark.parametrize("layout", ["ones", "transposed", "expanded", "sliced", "misaligned_1"])
@each_op
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_incoming_gradients(backend, op, layout, dtype):
    """`ones` is what .sum().backward() sends: one number, expanded with strides of 0."""
    problem = small(op, backend, dtype)
    check(problem, backend, shape_class="K40 N24", grad_layout=layout)


@pytest.mark.parametrize("layout", ["outer_transposed", "nan_border", "packed", "rows_sliced"])
@pytest.mark.parametrize("K", [32, 97])
@each_backend
def test_strided_images(backend, K, layout):
    """Four dimensions, as Swin's (B, H, W, C)."""
    problem = linear_gelu_problem((2, 2, 3, K), 40)
    check(problem, backend, shape_class=f"image K{K} N40", layout=layout)


@pytest.mark.parametrize("layout", NOT_CONTIGUOUS)
@pytest.mark.parametrize("which", ["x", "weight"])
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_one_operand_in_another_layout(backend, dtype, which, layout):
    """A weight kept transposed (Conv1D), sliced out of qkv or stacked; the other one is dense."""
    problem = small("linear_gelu", backend, dtype, (2, 21, 64), 48)
    problem.inputs[which] = in_layout(problem.inputs[which], layout)
    as_given(problem)
    check(problem, backend, shape_class=f"M42 K64 N48 {which} alone", layout=layout,
          grad_layout="contiguous")  # fmt: skip


def as_given(problem):
    """Let check() take the inputs as they lie in memory."""
    problem.laid_out = lambda layout: problem


SUBSETS = [
    wanted for size in (1, 2) for wanted in itertools.combinations(("x", "weight", "bias"), size)
]


@pytest.mark.parametrize("save", (True, False), ids=("saved", "recomputed"))
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@each_backend
def test_frozen_inputs(backend, wanted, save):
    """A frozen input gets no gradient, and the others' stay right."""
    problem = linear_gelu_problem((3, 5, 24), 40, save_preactivation=save)
    shape_class = f"K24 N40 grads {'+'.join(wanted)} saved {save}"
    check(problem, backend, shape_class=shape_class, wanted=wanted)


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@each_backend
def test_frozen_inputs_of_linear(backend, wanted):
    problem = linear_problem((3, 5, 24), 40)
    check(problem, backend, shape_class=f"K24 N40 grads {'+'.join(wanted)}", wanted=wanted)


@each_op
@each_backend
def test_outputs_are_contiguous_and_new(backend, op):
    problem = small(op, backend, FP32).laid_out("transposed")
    tensors = list(problem.inputs.values())
    y = problem.ours(backend)(*tensors)
    assert y.is_contiguous()
    assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("shape", [(0, 5, 24), (3, 0, 24), (0, 24)], ids=str)
@each_op
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_no_rows(backend, op, dtype, shape):
    """An empty batch gives an empty output, and zero gradients of the parameters."""
    problem = small(op, backend, dtype, shape, 40)
    (y,), grads = grads_of(problem.ours(backend), list(problem.inputs.values()))
    assert y.shape == (*shape[:-1], 40) and y.dtype == problem.inputs["x"].dtype
    for name, grad in zip(problem.inputs, grads, strict=True):
        assert grad.shape == problem.inputs[name].shape, name
        assert not grad.any(), name


@each_backend
def test_one_tensor_as_x_and_weight(backend):
    x = torch.randn(8, 24)
    incoming = [torch.randn(8, 8)]
    _, (together,) = grads_of(lambda t: linear_gelu(t, t, backend=backend), [x], incoming)
    _, apart = grads_of(lambda a, b: linear_gelu(a, b, backend=backend), [x, x.clone()], incoming)
    torch.testing.assert_close(together, sum(apart), rtol=1e-5, atol=1e-5)


@each_backend
def test_gradients_accumulate(backend):
    """Twice through one weight, as a shared layer's; accumulating into one changes no other."""
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    linear(linear_gelu(x, weight, backend=backend), weight, backend=backend).sum().backward()
    once = weight.grad.clone(), x.grad.clone()
    linear(linear_gelu(x, weight, backend=backend), weight, backend=backend).sum().backward()
    torch.testing.assert_close((weight.grad, x.grad), (2 * once[0], 2 * once[1]))


# ---- The saved pre-activation


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@backend_and_dtype(FUNCTIONS, DTYPE_IDS)
def test_saved_or_recomputed_the_bits_are_the_same(backend, approximate, dtype):
    for shape, N in (((3, 37, 72), 56), ((1, 7), 5)):
        problem = small("linear_gelu", backend, dtype, shape, N, approximate=approximate)
        tensors, incoming = list(problem.inputs.values()), [torch.randn(*shape[:-1], N)]
        saved, recomputed = (
            sum(grads_of(problem.ours(backend, save_preactivation=save), tensors, incoming), ())
            for save in (True, False)
        )
        assert_bitwise_equal(saved, recomputed, f"{backend} {approximate}")


def kept_for_backward(function, inputs):
    """Shapes that autograd keeps, without the inputs themselves."""
    given, kept = {t.data_ptr() for t in inputs}, []

    def pack(tensor):
        if tensor.data_ptr() not in given:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(*[t.detach().requires_grad_() for t in inputs])
    assert y.requires_grad
    return kept


@each_function
def test_what_is_kept(backend):
    """One tensor of y's shape with save_preactivation, nothing beside the inputs without it."""
    problem = linear_gelu_problem((2, 9, 24), 40)
    tensors = list(problem.inputs.values())
    assert kept_for_backward(problem.ours(backend), tensors) == [(2, 9, 40)]
    recomputing = problem.ours(backend, save_preactivation=False)
    assert kept_for_backward(recomputing, tensors) == []
    plain = linear_problem((2, 9, 24), 40)
    assert kept_for_backward(plain.ours(backend), list(plain.inputs.values())) == []


@each_backend
def test_no_gradient_keeps_nothing(backend):
    problem = linear_gelu_problem((2, 9, 24), 40)
    tensors = [t.requires_grad_() for t in problem.inputs.values()]
    with torch.no_grad():
        y = problem.ours(backend)(*tensors)
    assert not y.requires_grad and y.grad_fn is None
