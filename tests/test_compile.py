"""Every operator under torch.compile, torch.export, activation checkpointing and autocast."""

import io

import pytest
import torch
from every_op import OPS, OPS_AND_BACKENDS, RAW, small_problem
from problems import output_gradients
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from vitkernels import testing
from vitkernels.testing import as_tuple, assert_bitwise_equal, grads_of

each_op = pytest.mark.parametrize("op", OPS)
each_pair = pytest.mark.parametrize(("op", "backend"), OPS_AND_BACKENDS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def problem_with_dropout(op, dtype=torch.float32):
    return small_problem(op, dtype, dropout_p=0.0 if op == "layer_norm_add" else 0.25)


def seeded(problem, function):
    """`function` with the seed that problem.ours() sets, set outside of what is traced."""

    def call(*tensors):
        torch.manual_seed(problem.seed)
        return function(*tensors)

    return call


def run(problem, function):
    """Outputs and gradients, for one fixed random gradient of each output."""
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = as_tuple(problem.ours("reference")(*tensors))
    return sum(grads_of(function, tensors, output_gradients(problem, outputs)), ())


def assert_same(mine, theirs, backend):
    """Kernels give the same bits; compositions may be reordered by the compiler."""
    if backend in ("torch", "reference"):
        torch.testing.assert_close(mine, theirs, rtol=3e-6, atol=3e-6)
    else:
        assert_bitwise_equal(mine, theirs)


# ---- torch.compile


@each_pair
def test_fullgraph_forward_and_backward(op, backend):
    problem = problem_with_dropout(op)
    compiled = torch.compile(problem.unseeded(backend), backend="aot_eager", fullgraph=True)
    mine = run(problem, seeded(problem, compiled))
    assert_same(mine, run(problem, problem.ours(backend)), backend)
    testing.cases.record(op, backend, torch.float32, "compiled by aot_eager")


@each_op
def test_inductor(op):
    problem = problem_with_dropout(op)
    compiled = torch.compile(problem.unseeded(), fullgraph=True, dynamic=False)
    # Inductor draws random numbers its own way unless told to draw as eager does.
    with torch._inductor.config.patch(fallback_random=True):
        mine = run(problem, seeded(problem, compiled))
    torch.testing.assert_close(mine, run(problem, problem.ours()), rtol=3e-6, atol=3e-6)
    testing.cases.record(op, "auto", torch.float32, "compiled by inductor")


def test_dropout_under_inductor_differs_from_call_to_call():
    """And forward and backward agree about the mask: the gradient of a linear map shows it."""
    problem = problem_with_dropout("add_layer_norm")
    problem.options["row_scale"] = None
    compiled = torch.compile(problem.unseeded(), fullgraph=True, dynamic=False)
    x = torch.ones(2, 5, 24, requires_grad=True)
    masks = []
    for _ in range(2):
        _, stream = compiled(x, torch.zeros(2, 5, 24), None, None, torch.ones(24))
        (dx,) = torch.autograd.grad(stream.sum(), x)
        assert torch.equal(dx, stream.detach())
        masks.append(stream.detach() != 0)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("op", [op for op, backend in OPS_AND_BACKENDS if backend == "cpu"])
def test_the_graph_holds_the_raw_operator(op):
    """auto on CPU tensors: one call of the default overload each way, nothing decomposed."""
    problem, targets = small_problem(op), []

    def inspect(graph, _example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(problem.unseeded(), backend=aot_autograd(fw_compiler=inspect))
    run(problem, compiled)
    raw = [target for target in targets if target.startswith("vitkernels")]
    assert raw == [f"vitkernels.{RAW[op]}_fwd.default", f"vitkernels.{RAW[op]}_bwd.default"]


@each_pair
def test_one_graph_serves_every_batch_size(op, backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(small_problem(op).unseeded(backend), backend=counter, fullgraph=True)
    for batch in (3, 4, 7):
        problem = small_problem(op, batch=batch)
        tensors = [t.detach().requires_grad_() for t in problem.inputs.values()]
        options = {n: v for n, v in problem.options.items() if isinstance(v, torch.Tensor)}
        for tensor in (*tensors, *options.values()):
            if tensor.shape[0] == batch:
                torch._dynamo.mark_dynamic(tensor, 0)
        outputs = as_tuple(compiled(*tensors, **options))
        sum(o.sum() for o in outputs).backward()
        mine = [*outputs, *(t.grad for t in tensors)]
        theirs = sum(grads_of(problem.ours(backend), [t.detach() for t in tensors]), ())
        torch.testing.assert_close(mine, list(theirs), rtol=3e-6, atol=3e-6)
    assert counter.frame_count == 1


# ---- torch.export


class Module(torch.nn.Module):
    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, tensors, options):
        return self.function(*tensors, **options)


@each_op
def test_export_round_trip(op):
    """Saved, loaded, and run at another batch size."""

    def arguments(batch):
        problem = small_problem(op, batch=batch)
        options = {n: v for n, v in problem.options.items() if isinstance(v, torch.Tensor)}
        return problem, (tuple(problem.inputs.values()), options)

    problem, (tensors, options) = arguments(3)
    batch = torch.export.Dim("batch", min=2, max=64)

    def dims(tensor):
        return {0: batch} if tensor.shape[0] == 3 else {}

    module = Module(problem.unseeded(), options)
    shapes = (tuple(map(dims, tensors)), {name: dims(t) for name, t in options.items()})
    exported = torch.export.export(module, (tensors, options), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (3, 5):
        problem, args = arguments(size)
        expected = problem.ours()(*args[0])
        torch.testing.assert_close(loaded(*args), expected, rtol=3e-6, atol=3e-6)
    testing.cases.record(op, "auto", torch.float32, "exported")


# ---- Activation checkpointing


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@each_pair
def test_checkpoint_recomputes_the_same_dropout(op, backend, compiled):
    problem = problem_with_dropout(op)
    function = problem.unseeded(backend)

    def recomputed(*tensors):
        return checkpoint(function, *tensors, use_reentrant=False)

    if compiled:
        recomputed = torch.compile(recomputed, backend="aot_eager", fullgraph=True)
    mine = run(problem, seeded(problem, recomputed))
    assert_same(mine, run(problem, problem.ours(backend)), backend)


@each_op
def test_checkpoint_may_recompute_on_another_backend(op):
    """Every backend saves tensors of the same names, shapes and dtypes."""
    problem = problem_with_dropout(op)
    backends = [name for o, name in OPS_AND_BACKENDS if o == op and name != "torch"]
    turn = iter((backends[0], "reference"))

    def alternating(*tensors):
        return problem.unseeded(next(turn))(*tensors)

    def recomputed(*tensors):
        return checkpoint(alternating, *tensors, use_reentrant=False)

    mine = run(problem, seeded(problem, recomputed))
    torch.testing.assert_close(mine, run(problem, problem.ours("reference")), rtol=1e-5, atol=1e-5)
    assert next(turn, None) is None, "the forward was not recomputed"


# ---- Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("branch", ["fp32", "16-bit"])
@pytest.mark.parametrize("backend", [name for o, name in OPS_AND_BACKENDS if o == "add_layer_norm"])
def test_autocast_of_add_layer_norm(backend, branch, dtype):
    """y comes in the autocast dtype, the stream keeps its own, gradients their parameters'."""
    problem = small_problem("add_layer_norm")
    if branch != "fp32":
        problem.inputs["x"] = problem.inputs["x"].to(dtype)
    with torch.autocast("cpu", dtype):
        y, stream = problem.ours(backend)(*problem.inputs.values())
        mine = run(problem, problem.ours(backend))
    assert y.dtype == dtype and stream.dtype == torch.float32
    explicit = run(problem, problem.ours(backend, out_dtype=dtype))
    assert_bitwise_equal(mine, explicit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("op", "backend"), [pair for pair in OPS_AND_BACKENDS if "attention" in pair[0]]
)
def test_autocast_of_attention(op, backend, dtype):
    """q, k, v are cast like a matrix product's; the bias and every gradient keep their dtypes."""
    problem = small_problem(op)
    kept = ("bias", "bias_table", "logit_scale")

    def cast_by_hand(*tensors):
        cast = [
            t if n in kept else t.to(dtype) for n, t in zip(problem.inputs, tensors, strict=True)
        ]
        return problem.ours(backend)(*cast)

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype):
            return problem.ours(backend)(*tensors)

    tensors = list(problem.inputs.values())
    out, grads = grads_of(under_autocast, tensors)
    expected, expected_grads = grads_of(cast_by_hand, tensors)
    assert out[0].dtype == dtype and all(g.dtype == torch.float32 for g in grads)
    assert_bitwise_equal((*out, *grads), (*expected, *expected_grads))


@pytest.mark.parametrize("backend", [name for o, name in OPS_AND_BACKENDS if o == "layer_norm_add"])
def test_autocast_leaves_layer_norm_add_alone(backend):
    """Its result is the residual stream, in the residual's dtype."""
    problem = small_problem("layer_norm_add")
    expected = run(problem, problem.ours(backend))
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(run(problem, problem.ours(backend)), expected)


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_float64_alone(op):
    """As in stock PyTorch: what came in float64 is not rounded to 16 bits."""
    problem = small_problem(op).double()
    problem.options.pop("out_dtype", None)
    expected = run(problem, problem.ours())
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(run(problem, problem.ours()), expected)
