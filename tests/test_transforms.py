"""Every operator under opcheck, torch.compile, export, checkpointing, autocast and torch.func."""

import pytest
import torch
from every_op import KERNELS, OPS, OPS_AND_BACKENDS, RAW, RawCalls, small_problem
from problems import output_gradients

from vitkernels.testing import as_tuple, assert_bitwise_equal, grads_of

each_op = pytest.mark.parametrize("op", OPS)
each_kernel = pytest.mark.parametrize(("op", "backend"), KERNELS)
each_pair = pytest.mark.parametrize(("op", "backend"), OPS_AND_BACKENDS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def with_dropout(op):
    return 0.0 if op == "layer_norm_add" else 0.25


def run(problem, function):
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = as_tuple(function(*tensors))
    return sum(grads_of(function, tensors, output_gradients(problem, outputs)), ())


# ---- The raw operators' contracts


@each_kernel
def test_opcheck(op, backend):
    """Schema, fakes and AOT dispatch of each raw operator, forward and backward; strides too."""
    problem = small_problem(op, dropout_p=with_dropout(op))
    with RawCalls() as raw:
        run(problem, problem.ours(backend))
    names = {str(func) for func, _, _ in raw.calls}
    raw_op = RAW[op]
    assert names == {f"vitkernels.{raw_op}_fwd.{backend}", f"vitkernels.{raw_op}_bwd.{backend}"}
    for func, args, _ in raw.calls:
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(func, tuple(detached))


@each_kernel
def test_fakes_predict_shapes_dtypes_and_strides(op, backend):
    problem = small_problem(op, torch.bfloat16)
    with RawCalls() as raw:
        run(problem.laid_out("outer_transposed"), problem.ours(backend))
    for func, args, results in raw.calls:
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = func(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for real, fake in zip(as_tuple(results), as_tuple(fakes), strict=True):
            assert (real is None) == (fake is None), func
            if real is not None:
                assert (real.shape, real.dtype) == (fake.shape, fake.dtype), func
                assert real.stride() == fake.stride(), func


@each_kernel
def test_every_backend_saves_the_same_tensors(op, backend):
    """So that a checkpoint may recompute on another backend."""
    signatures = []
    for name in (backend, "reference"):
        saved = []
        problem = small_problem(op)
        leaves = [t.detach().requires_grad_() for t in problem.inputs.values()]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append((tuple(t.shape), t.dtype)) or t, lambda t: t
        ):
            problem.ours(name)(*leaves)
        signatures.append(saved)
    assert signatures[0] == signatures[1] and signatures[0]


@each_pair
def test_meta_tensors_give_shapes(op, backend):
    problem = small_problem(op, torch.bfloat16)
    outputs = as_tuple(problem.ours(backend)(*problem.inputs.values()))
    metas = [t.to("meta") for t in problem.inputs.values()]
    options = {
        name: value.to("meta")
        for name, value in problem.options.items()
        if isinstance(value, torch.Tensor)
    }
    fakes = as_tuple(problem.ours(None, **options)(*metas))
    for real, fake in zip(outputs, fakes, strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype) and fake.is_meta


# ---- Derivatives


@each_op
def test_gradcheck_of_the_reference(op):
    problem = small_problem(op, dropout_p=with_dropout(op)).double()
    if problem.options.get("row_scale") is not None:
        problem.options["row_scale"] = problem.options["row_scale"].float()
    inputs = [t.clone().requires_grad_() for t in problem.inputs.values()]
    assert torch.autograd.gradcheck(problem.ours("reference"), inputs, fast_mode=True)


@each_op
def test_auto_takes_the_reference_in_float64(op):
    problem = small_problem(op).double()
    assert_bitwise_equal(run(problem, problem.ours()), run(problem, problem.ours("reference")))


@pytest.mark.parametrize("loss_of", [torch.Tensor.sum, lambda o: o.square().sum()], ids=["sum", ""])
@each_kernel
def test_double_backward_is_refused(op, backend, loss_of):
    """An unmarked one would silently return None; torch's own mark takes the gradient of a sum for
    a constant, since the incoming gradient is one."""
    problem = small_problem(op)
    leaves = [t.detach().requires_grad_() for t in problem.inputs.values()]
    loss = sum(map(loss_of, as_tuple(problem.ours(backend)(*leaves))))
    (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_kernel
def test_torch_func_refuses_a_second_derivative(op, backend):
    problem = small_problem(op)
    first, *rest = problem.inputs.values()

    def slope(x):
        def loss(x):
            return sum(o.square().sum() for o in as_tuple(problem.ours(backend)(x, *rest)))

        return torch.func.grad(loss)(x).square().sum()

    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.func.grad(slope)(first)


@each_pair
def test_torch_func_grad(op, backend):
    problem = small_problem(op)
    tensors = list(problem.inputs.values())

    def loss(*inputs):
        return sum(o.square().sum() for o in as_tuple(problem.ours(backend)(*inputs)))

    through_func = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    _, expected = grads_of(loss, tensors)
    for mine, theirs in zip(through_func, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@each_pair
def test_functional_call_with_grad(op, backend):
    """value_and_grad over a module's parameters, as functional training loops use it."""

    class Module(torch.nn.Module):
        def __init__(self, problem):
            super().__init__()
            self.first = torch.nn.Parameter(next(iter(problem.inputs.values())))
            self.problem = problem

        def forward(self):
            rest = list(self.problem.inputs.values())[1:]
            return as_tuple(self.problem.ours(backend)(self.first, *rest))[0].square().mean()

    module = Module(small_problem(op))
    params = dict(module.named_parameters())
    grads, value = torch.func.grad_and_value(lambda p: torch.func.functional_call(module, p, ()))(
        params
    )
    module().backward()
    assert torch.equal(value, module())
    torch.testing.assert_close(grads["first"], module.first.grad, rtol=1e-6, atol=1e-6)


# ---- PyTorch's global settings


@each_pair
def test_the_default_dtype_changes_nothing(op, backend):
    """Scratch memory and constants too are of the dtypes that the tensors ask for."""
    problem = small_problem(op, dropout_p=with_dropout(op))
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = as_tuple(problem.ours(backend)(*tensors))
    incoming = output_gradients(problem, outputs)
    expected = sum(grads_of(problem.ours(backend), tensors, incoming), ())
    torch.set_default_dtype(torch.bfloat16)
    try:
        mine = sum(grads_of(problem.ours(backend), tensors, incoming), ())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_bitwise_equal(mine, expected)


# ---- Tensors among the options


WITHOUT = ("linear", "linear_gelu", "patch_merge_layer_norm", "window_attention")


@pytest.mark.parametrize(("op", "backend"), [p for p in OPS_AND_BACKENDS if p[0] not in WITHOUT])
def test_options_in_any_layout(op, backend):
    """Masks, DropPath's factors, statistics, targets: slices of something larger, and expanded."""
    problem = small_problem(op, batch=3)
    given = {name: v for name, v in problem.options.items() if isinstance(v, torch.Tensor)}
    changes = {name: torch.stack((v, v), -1)[..., 0] for name, v in given.items()}
    assert_bitwise_equal(
        run(problem, problem.ours(backend, **changes)), run(problem, problem.ours(backend))
    )
    expanded = {name: v[:1].expand(v.shape) for name, v in given.items()}
    same = {name: v.contiguous() for name, v in expanded.items()}
    assert_bitwise_equal(
        run(problem, problem.ours(backend, **expanded)),
        run(problem, problem.ours(backend, **same)),
    )
