"""add_layer_norm and layer_norm_add: memory layouts, missing gradients, and what may be touched."""

import itertools

import pytest
import torch
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from problems import DTYPE_IDS, check

from vitkernels.testing import LAYOUTS, available_for, grads_of

BACKENDS = available_for("add_layer_norm")
MAKERS = {"add_layer_norm": layer_norm_problem, "layer_norm_add": layer_norm_add_problem}

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_op = pytest.mark.parametrize("op", MAKERS)
each_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=DTYPE_IDS.get
)


@each_dtype
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@each_op
@each_backend
def test_layouts_of_inputs_and_gradients(backend, op, layout, dtype):
    check(MAKERS[op]((3, 7, 40), dtype), backend, shape_class="C40", layout=layout)


@pytest.mark.parametrize("skip", range(1, 16))
@each_backend
def test_every_misalignment(backend, skip):
    problem = layer_norm_problem((2, 3, 40), torch.bfloat16)
    check(problem, backend, shape_class="C40", layout=f"misaligned_{skip}")


@each_dtype
@pytest.mark.parametrize("layout", ["ones", "transposed", "expanded", "sliced", "misaligned_1"])
@each_op
@each_backend
def test_incoming_gradients(backend, op, layout, dtype):
    """`ones` is what .sum().backward() sends: one number, expanded with strides of 0."""
    check(MAKERS[op]((3, 7, 40), dtype), backend, shape_class="C40", grad_layout=layout)


@pytest.mark.parametrize("layout", ["outer_transposed", "nan_border", "packed"])
@pytest.mark.parametrize("channels", [96, 1024])
@each_backend
def test_strided_images(backend, channels, layout):
    """Four dimensions, as Swin's (B, H, W, C)."""
    problem = layer_norm_problem((2, 2, 3, channels), torch.float32)
    check(problem, backend, shape_class=f"image C{channels}", layout=layout)


@pytest.mark.parametrize("used", ["y", "new_residual"])
@each_backend
def test_a_loss_of_one_output(backend, used):
    problem = layer_norm_problem((3, 7, 40))
    check(problem, backend, shape_class=f"C40 only {used}", used=(used,))


ADD_LAYER_NORM_INPUTS = ("x", "residual", "weight", "bias", "gamma")
SUBSETS = [
    wanted for size in range(1, 5) for wanted in itertools.combinations(ADD_LAYER_NORM_INPUTS, size)
]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@each_backend
def test_frozen_inputs(backend, wanted):
    """A frozen input gets no gradient, and the others' stay right."""
    problem = layer_norm_problem((3, 5, 24))
    check(problem, backend, shape_class=f"C24 grads {'+'.join(wanted)}", wanted=wanted)


@pytest.mark.parametrize(
    "wanted", [("x",), ("residual",), ("x", "residual"), ("residual", "weight")]
)
@each_backend
def test_frozen_inputs_of_an_unscaled_branch(backend, wanted):
    """Without gamma, row_scale and dropout the branch and the stream have one gradient."""
    problem = layer_norm_problem((3, 5, 24), gamma=False, row_scale=False)
    check(problem, backend, shape_class=f"C24 plain grads {'+'.join(wanted)}", wanted=wanted)


@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("weight",), ("bias",), ("x", "bias")])
@each_backend
def test_frozen_inputs_of_layer_norm_add(backend, wanted):
    problem = layer_norm_add_problem((3, 5, 24))
    check(problem, backend, shape_class=f"C24 grads {'+'.join(wanted)}", wanted=wanted)


@each_backend
def test_gradients_of_two_leaves_do_not_share_memory(backend):
    """Accumulating into one must not change the other."""
    x, residual = (torch.randn(3, 5, 24, requires_grad=True) for _ in range(2))
    problem = layer_norm_problem((3, 5, 24), gamma=False, row_scale=False)
    for _ in range(2):
        y, stream = problem.ours(backend)(x, residual, None, None, None)
        (y.sum() + stream.sum()).backward()
    first = x.grad.clone()
    residual.grad.zero_()
    assert torch.equal(x.grad, first) and x.grad.abs().sum() > 0


@each_backend
def test_one_tensor_as_branch_and_stream(backend):
    x = torch.randn(3, 5, 24)
    problem = layer_norm_problem((3, 5, 24))
    weight, bias, gamma = (problem.inputs[name] for name in ("weight", "bias", "gamma"))

    def both(t):
        return problem.ours(backend)(t, t, weight, bias, gamma)

    def apart(a, b):
        return problem.ours(backend)(a, b, weight, bias, gamma)

    incoming = [torch.randn(3, 5, 24), torch.randn(3, 5, 24)]
    _, (together,) = grads_of(both, [x], incoming)
    _, (dx, dresidual) = grads_of(apart, [x, x.clone()], incoming)
    torch.testing.assert_close(together, dx + dresidual, rtol=1e-6, atol=1e-6)


@each_op
@each_backend
def test_outputs_are_contiguous_and_new(backend, op):
    problem = MAKERS[op]((3, 7, 40)).laid_out("transposed")
    tensors = list(problem.inputs.values())
    outputs = problem.ours(backend)(*tensors)
    given = {t.untyped_storage().data_ptr() for t in tensors}
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert output.untyped_storage().data_ptr() not in given
        assert output.is_contiguous() or backend == "torch"


@pytest.mark.parametrize("shape", [(0, 5, 24), (3, 0, 24), (0, 24)], ids=str)
@each_op
@each_backend
def test_no_rows(backend, op, shape):
    """An empty batch gives empty outputs, and zero gradients of the parameters."""
    problem = MAKERS[op](shape, row_scale=False)
    outputs, grads = grads_of(problem.ours(backend), list(problem.inputs.values()))
    assert all(output.shape == shape for output in outputs)
    for name, grad in zip(problem.inputs, grads, strict=True):
        assert grad.shape == problem.inputs[name].shape, name
        assert not grad.any(), name
