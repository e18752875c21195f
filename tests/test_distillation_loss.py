"""distillation_loss: loss and both gradients against float64, every backend."""

import pytest
import torch
import torch.nn.functional as F
from distillation_problems import distillation_problem
from problems import DTYPE_IDS, backend_and_dtype, check

from vitkernels import nn as vnn
from vitkernels import ops
from vitkernels.testing import available_for, grads_of

BACKENDS = available_for("distillation_loss")
DTYPES = tuple(DTYPE_IDS)
FP32, BF16, FP16 = DTYPES
# digits, CIFAR, ImageNet and its 21k; below, at and across a vector, and a block of 1024 and 4096.
CLASSES = (2, 3, 10, 16, 33, 100, 1000, 1024, 1025, 4100)
KINDS = {
    "soft": {"temperature": 3.0},
    "hard": {"kind": "hard"},
    "smoothed": {"label_smoothing": 0.1},
    "mixup": {"soft_targets": FP32, "label_smoothing": 0.1, "temperature": 2.0},
}

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def exactly(problem):
    """With an incoming gradient that is a power of two: no second rounding to be allowed for."""
    problem.by_power_of_two = True
    return problem


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("classes", CLASSES)
@backend_and_dtype(BACKENDS, DTYPES)
def test_every_width(backend, classes, dtype, name):
    rows = 3 if backend == "triton" else 13
    problem = distillation_problem((rows, classes), dtype, **KINDS[name])
    check(problem, backend, shape_class=f"K{classes} {name}", grad_layout="contiguous")
    check(exactly(problem), backend, shape_class=f"K{classes} {name}", grad_layout="ones")


@pytest.mark.parametrize("name", ("soft", "hard"))
@backend_and_dtype([b for b in BACKENDS if b != "triton"], DTYPES)
def test_imagenet_21k(backend, dtype, name):
    problem = exactly(distillation_problem((5, 21841), dtype, **KINDS[name]))
    check(problem, backend, shape_class=f"K21841 {name}", grad_layout="ones")


@pytest.mark.parametrize("rows", (1, 2, 31, 300))
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_every_batch(backend, rows, dtype):
    problem = distillation_problem((rows, 10), dtype, temperature=2.0)
    check(problem, backend, shape_class=f"B{rows} K10", grad_layout="contiguous")


@each_backend
def test_one_class_has_no_loss(backend):
    problem = distillation_problem((3, 1))
    (loss,), grads = grads_of(problem.ours(backend), list(problem.inputs.values()))
    assert loss == 0 and all(torch.equal(g, torch.zeros(3, 1)) for g in grads)


@pytest.mark.parametrize("temperature", (0.1, 1.0, 4.0, 20.0))
@pytest.mark.parametrize("reduction", ("batchmean", "deit"))
@each_backend
def test_temperature_and_reduction(backend, reduction, temperature):
    options = {"temperature": temperature, "reduction": reduction}
    problem = distillation_problem((9, 40), **options)
    check(problem, backend, shape_class=f"K40 {options}", grad_layout="contiguous")


@pytest.mark.parametrize("alpha", (0.0, 0.1, 1.0))
@pytest.mark.parametrize("kind", ("soft", "hard"))
@backend_and_dtype(BACKENDS, (FP32, FP16))
def test_alpha(backend, kind, alpha, dtype):
    problem = distillation_problem((6, 50), dtype, kind=kind, alpha=alpha)
    check(problem, backend, shape_class=f"K50 {kind} alpha {alpha}", grad_layout="contiguous")


@pytest.mark.parametrize("smoothing", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("targets", (None, *DTYPES), ids=lambda d: DTYPE_IDS.get(d, "ids"))
@each_backend
def test_targets(backend, targets, smoothing):
    options = {"soft_targets": targets, "label_smoothing": smoothing}
    problem = distillation_problem((6, 50), **options)
    name = f"K50 targets {DTYPE_IDS.get(targets, 'ids')} smoothing {smoothing}"
    check(problem, backend, shape_class=name, grad_layout="contiguous")


@pytest.mark.parametrize("scale", (0.5, 3.0))
@each_backend
def test_targets_need_not_sum_to_one(backend, scale):
    """As in torch: their sum is what the log of the softmax's sum is multiplied by."""
    problem = distillation_problem((6, 50), soft_targets=FP32, label_smoothing=0.1)
    problem.options["targets"] *= scale
    check(problem, backend, shape_class=f"K50 targets times {scale}", grad_layout="contiguous")


@pytest.mark.parametrize("teacher", DTYPES, ids=DTYPE_IDS.get)
@backend_and_dtype(BACKENDS, DTYPES)
def test_teacher_of_another_dtype(backend, dtype, teacher):
    for kind in ("soft", "hard"):
        problem = distillation_problem((7, 100), dtype, teacher_dtype=teacher, kind=kind)
        name = f"K100 {kind} teacher {DTYPE_IDS[teacher]}"
        check(problem, backend, shape_class=name, grad_layout="contiguous")


@pytest.mark.parametrize("autocast", (BF16, FP16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS.get)
@each_backend
def test_autocast_changes_nothing(backend, dtype, autocast):
    """A loss is fp32 under autocast; here it is without it, too."""
    problem, plain = (
        distillation_problem((4, 30), dtype, autocast=mode) for mode in (autocast, None)
    )
    tensors = list(problem.inputs.values())
    (loss,), grads = grads_of(problem.ours(backend), tensors)
    (expected,), expected_grads = grads_of(plain.ours(backend), tensors)
    assert loss.dtype == FP32 and torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@each_backend
def test_int32_class_ids(backend):
    problem = distillation_problem((6, 20))
    tensors = list(problem.inputs.values())
    expected = problem.ours(backend)(*tensors)
    problem.options["targets"] = problem.options["targets"].int()
    assert torch.equal(problem.ours(backend)(*tensors), expected)


@each_backend
def test_one_head_may_be_both(backend):
    """Distillation without a token: gradients of the two parts add up."""
    problem = distillation_problem((6, 20), temperature=2.0)
    logits = problem.inputs["logits"]
    (loss,), (grad,) = grads_of(lambda x: problem.ours(backend)(x, x), [logits])
    (other,), parts = grads_of(problem.ours(backend), [logits, logits.clone()])
    assert torch.equal(loss, other)
    torch.testing.assert_close(grad, parts[0] + parts[1], rtol=1e-6, atol=1e-8)


# ---- The original's formulas


@pytest.mark.parametrize("reduction", ("batchmean", "deit"))
@pytest.mark.parametrize("name", KINDS)
def test_the_original_and_the_specification_agree_in_float64(name, reduction):
    """The yardstick and the truth were written apart; in float64 they are one function."""
    problem = distillation_problem((7, 23), torch.float64, reduction=reduction, **KINDS[name])
    tensors = list(problem.inputs.values())
    for mine, theirs in zip(
        *(sum(grads_of(f, tensors), ()) for f in (problem.truth(), problem.base())), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@each_backend
def test_the_original_divides_soft_distillation_by_every_element(backend):
    """Its defect: K times less distillation than KL's mean over the batch."""
    problem = distillation_problem((5, 40), alpha=1.0, temperature=3.0)
    tensors = list(problem.inputs.values())
    batchmean, deit = (problem.ours(backend, reduction=r)(*tensors) for r in ("batchmean", "deit"))
    torch.testing.assert_close(deit * 40, batchmean)
    hard = [
        problem.ours(backend, reduction=r, kind="hard")(*tensors) for r in ("batchmean", "deit")
    ]
    assert torch.equal(*hard)


@pytest.mark.parametrize("name", KINDS)
def test_the_module_is_the_operator(name):
    problem = distillation_problem((5, 12), **KINDS[name])
    teacher, targets = (problem.options.pop(n) for n in ("teacher_logits", "targets"))
    module = vnn.DistillationLoss(**problem.options)
    heads = tuple(problem.inputs.values())
    expected = ops.distillation_loss(*heads, teacher, targets, **problem.options)
    assert torch.equal(module(heads, targets, teacher), expected)
    one = ops.distillation_loss(heads[0], heads[0], teacher, targets, **problem.options)
    assert torch.equal(module(heads[0], targets, teacher), one)
    for option, value in problem.options.items():
        assert f"{option}={value!r}" in repr(module)


def test_the_module_as_timm_distils():
    """timm's TokenDistillationTask: complementary weights are alpha, its soft loss batchmean."""
    problem = distillation_problem((5, 12), temperature=2.0, alpha=0.3)
    heads, T = tuple(problem.inputs.values()), 2.0
    teacher, targets = problem.options["teacher_logits"], problem.options["targets"]
    soft = F.kl_div(
        F.log_softmax(heads[1] / T, dim=-1), F.log_softmax(teacher / T, dim=-1),
        reduction="batchmean", log_target=True,
    ) * T**2  # fmt: skip
    expected = 0.7 * F.cross_entropy(heads[0], targets) + 0.3 * soft
    module = vnn.DistillationLoss(alpha=0.3, temperature=2.0)
    torch.testing.assert_close(module(heads, targets, teacher), expected)


# ---- What is kept from the forward to the backward


def through(problem, backend, make=lambda x: 1.0 * x):
    """(loss, leaves), the heads' logits being no leaves, as a model's are not."""
    leaves = [t.clone().requires_grad_() for t in problem.inputs.values()]
    return problem.ours(backend)(*map(make, leaves)), leaves


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
def test_only_the_gradients_are_kept(backend):
    problem = distillation_problem((6, 300), BF16, temperature=2.0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        through(problem, backend, lambda x: x.view_as(x))
    assert [(t.shape, t.dtype) for t in kept] == [((6, 300), BF16)] * 2


@pytest.mark.parametrize("wanted", [(), ("logits",), ("distill_logits",)], ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
def test_no_gradient_is_made_that_nobody_wants(backend, wanted):
    problem = distillation_problem((6, 30))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tensors = [t.clone().requires_grad_(n in wanted) for n, t in problem.inputs.items()]
        loss = problem.ours(backend)(*tensors)
    assert len(kept) == len(wanted) and loss.requires_grad == bool(wanted)
    if wanted:
        check(problem, backend, shape_class=f"K30 {wanted}", wanted=wanted,
              grad_layout="contiguous")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS.get)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_the_backward_twice_with_the_graph_kept(backend, dtype):
    """Gradients are handed on as they were kept when 1 comes in: that may not change them."""
    problem = distillation_problem((6, 30), dtype)
    expected = through(problem, backend)
    expected[0].backward()
    for make in (lambda x: x, lambda x: 1.0 * x, lambda x: x.view_as(x)):
        loss, leaves = through(problem, backend, make)
        for _ in range(3):
            loss.backward(retain_graph=True)
        for leaf, once in zip(leaves, expected[1], strict=True):
            torch.testing.assert_close(leaf.grad, 3 * once.grad, rtol=2e-2, atol=0)


@pytest.mark.parametrize("factor", (1.0, 0.25, 65536.0))
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_loss_scaling_saves_fp16_gradients(backend, factor):
    """A mean over 4096 rows has gradients below fp16's normal numbers; the loss is scaled after."""
    problem = distillation_problem((4096, 10), FP16, alpha=0.3)
    tensors = list(problem.inputs.values())
    incoming = [torch.tensor(factor)]
    _, ours = grads_of(problem.ours(backend), tensors, incoming)
    doubles = [t.double() for t in tensors]
    _, exact = grads_of(problem.truth(), doubles, incoming)
    subnormal = torch.finfo(FP16).smallest_normal * 2.0**-10
    for mine, truth in zip(ours, exact, strict=True):
        cancelled = 8 * torch.finfo(FP32).eps * truth.abs().max()  # of softmax - target
        limit = torch.finfo(FP16).eps * truth.abs() + subnormal + cancelled
        assert ((mine.double() - truth).abs() <= limit).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="without the C++ library")
@pytest.mark.parametrize("shape", [(64, 1000), (16, 21841)], ids=str)
def test_peak_memory_beside_eager(shape):
    """Aim: 60% of what the original's composition needs for loss and gradients."""
    pytest.importorskip("benchmarks")
    from benchmarks.bench_distillation_loss import case, peak_bytes
    from benchmarks.harness import BOTH, problem_of

    one = case("any", shape, FP32, BOTH)
    inputs, grads = problem_of(one)
    runners = one.runners()
    ours, eager = (peak_bytes(runners[n], inputs, grads) for n in ("vitkernels", "eager"))
    gradients = 2 * inputs[0].numel() * 4
    assert gradients <= ours < gradients + 16384 and ours <= 0.6 * eager
