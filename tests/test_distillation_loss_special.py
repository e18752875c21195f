"""distillation_loss: memory layouts, special values, symmetries, determinism, raw calls."""

import math

import pytest
import torch
from distillation_problems import distillation_problem
from problems import DTYPE_IDS, backend_and_dtype, check

from vitkernels.testing import (
    LAYOUTS,
    assert_bitwise_equal,
    available_for,
    grads_of,
    in_layout,
    same_specials,
)

BACKENDS = available_for("distillation_loss")
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]
FP32, BF16, FP16 = DTYPE_IDS
NAN, INF = math.nan, math.inf

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)


def run(problem, backend, incoming=1.0):
    tensors = list(problem.inputs.values())
    grads = [torch.tensor(incoming)]
    return sum(grads_of(problem.ours(backend), tensors, grads), ())


# ---- Memory layouts


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("soft_targets", [None, FP32], ids=["ids", "soft"])
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_layouts_of_logits_teacher_and_targets(backend, soft_targets, layout, dtype):
    problem = distillation_problem((5, 24), dtype, soft_targets=soft_targets)
    name = f"K24 {'ids' if soft_targets is None else 'soft'}"
    check(problem, backend, shape_class=name, layout=layout, grad_layout="contiguous")


@pytest.mark.parametrize("skip", range(1, 16))
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_every_misalignment(backend, skip):
    problem = distillation_problem((3, 1030), BF16)
    layout = f"misaligned_{skip}"
    check(problem, backend, shape_class="K1030", layout=layout, grad_layout="contiguous")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "nan_border", "expanded"])
@pytest.mark.parametrize("which", ["logits", "distill_logits", "teacher_logits"])
@each_backend
def test_one_head_in_another_layout(backend, which, layout):
    problem = distillation_problem((4, 40), temperature=2.0)
    where = problem.options if which == "teacher_logits" else problem.inputs
    where[which] = in_layout(where[which], layout)
    problem.laid_out = lambda _: problem
    check(problem, backend, shape_class=f"K40 {which} alone", layout=layout,
          grad_layout="contiguous")  # fmt: skip


@each_backend
def test_class_ids_of_any_stride(backend):
    problem = distillation_problem((6, 20))
    ids = problem.options["targets"]
    expected = run(problem, backend)
    problem.options["targets"] = torch.stack((ids, ids + 99), 1)[:, 0]
    assert_bitwise_equal(run(problem, backend), expected)


@each_backend
def test_gradients_are_contiguous(backend):
    problem = distillation_problem((6, 20)).laid_out("transposed")
    for grad in run(problem, backend)[1:]:
        assert grad.is_contiguous() and grad.shape == (6, 20)


# ---- Special values


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 29), (3, 16), (1, 1024)], ids=str)
@pytest.mark.parametrize("which", ["logits", "distill_logits", "teacher_logits", "targets"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
@each_backend
def test_specials_spread_as_in_the_reference(backend, kind, which, place, value):
    """One bad value spoils the loss, and its row's gradient, and nothing else."""
    if which == "targets":
        value = NAN  # infinite probabilities mean nothing
    classes = 1030 if place[1] >= 30 else 30
    options = {"kind": kind, "soft_targets": FP32, "label_smoothing": 0.1, "spread": 1.0}
    problem = distillation_problem((4, classes), **options)
    where = problem.inputs if which in problem.inputs else problem.options
    where[which][place] = value
    ours, expected = run(problem, backend), run(problem, "reference")
    for name, mine, theirs in zip(("loss", "dx", "dz"), ours, expected, strict=True):
        assert not same_specials(mine, theirs, name)
        if name != "loss":
            clean = [row for row in range(4) if row != place[0]]
            assert torch.isfinite(mine[clean]).all()
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("classes", (30, 3000))
@each_backend
def test_classes_that_are_ruled_out(backend, classes):
    """-inf in teacher and student: a class of no probability adds nothing, as it does in theory."""
    problem = distillation_problem((4, classes), temperature=2.0)
    problem.options["targets"].fill_(classes - 1)
    out = slice(0, classes // 2)
    for tensor in (*problem.inputs.values(), problem.options["teacher_logits"]):
        tensor[1:3, out] = -INF
    loss, *grads = run(problem, backend)
    rest = [t[1:3, classes // 2 :] for t in problem.inputs.values()]
    small = distillation_problem((2, classes // 2), temperature=2.0)
    small.options["teacher_logits"] = problem.options["teacher_logits"][1:3, classes // 2 :]
    small.options["targets"] = problem.options["targets"][1:3] - classes // 2
    _, expected = grads_of(small.truth(), [t.double() for t in rest])
    assert torch.isfinite(loss)
    for grad, wanted in zip(grads, expected, strict=True):
        assert (grad[1:3, out] == 0).all()
        torch.testing.assert_close(
            2 * grad[1:3, classes // 2 :].double(), wanted, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("offset", [-1e4, 1e4], ids=str)
@each_backend
def test_logits_of_1e4(backend, offset):
    problem = distillation_problem((5, 40), temperature=2.0, label_smoothing=0.1)
    for tensor in (*problem.inputs.values(), problem.options["teacher_logits"]):
        tensor += offset
    check(problem, backend, shape_class=f"K40 plus {offset}", grad_layout="contiguous")


@pytest.mark.parametrize("classes", (40, 2100))
@pytest.mark.parametrize("spread", [0.0, 1e-3, 100.0], ids=str)
@each_backend
def test_flat_and_certain(backend, spread, classes):
    """All classes alike, and one class alone: probabilities of 1 / K, of 0 and of 1."""
    rows = 2 if backend == "triton" else 6
    problem = distillation_problem((rows, classes), spread=spread, label_smoothing=0.1)
    check(problem, backend, shape_class=f"K{classes} spread {spread}", grad_layout="contiguous")


@each_kernel
def test_largest_finite_values(backend):
    problem = distillation_problem((4, 40))
    problem.inputs["logits"][1, 3] = torch.finfo(FP32).max
    problem.inputs["distill_logits"][2, 5] = -torch.finfo(FP32).max
    for mine, theirs in zip(run(problem, backend), run(problem, "reference"), strict=True):
        assert not same_specials(mine, theirs)


@pytest.mark.parametrize("classes", (7, 40, 3000))
@each_backend
def test_hard_distillation_takes_the_first_of_equals(backend, classes):
    problem = distillation_problem((3, classes), kind="hard", alpha=1.0)
    teacher = problem.options["teacher_logits"]
    for row, (first, second) in enumerate(((0, 1), (2, classes - 1), (classes // 2, classes - 2))):
        teacher[row, [first, second]] = 50.0
    _, _, ddistill = run(problem, backend)
    firsts = torch.tensor([0, 2, classes // 2])
    assert torch.equal(ddistill.argmin(1), firsts)
    assert (ddistill < 0).sum() == 3


# ---- Symmetries


@each_backend
def test_permuting_classes_permutes_the_gradients(backend):
    problem = distillation_problem((4, 50), temperature=2.0, soft_targets=FP32)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    loss, *grads = run(problem, backend)
    problem.inputs = {n: t[:, order] for n, t in problem.inputs.items()}
    for name in ("teacher_logits", "targets"):
        problem.options[name] = problem.options[name][:, order]
    other, *others = run(problem, backend)
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a[:, order], b, rtol=1e-5, atol=1e-8)


@each_backend
def test_a_constant_added_to_logits_changes_nothing(backend):
    problem = distillation_problem((4, 50), temperature=2.0)
    loss, *grads = run(problem, backend)
    problem.inputs["distill_logits"] += 4.0
    problem.options["teacher_logits"] += 16.0
    other, *others = run(problem, backend)
    torch.testing.assert_close(loss, other, rtol=3e-6, atol=0)
    torch.testing.assert_close(grads, others, rtol=1e-4, atol=1e-6)


@each_kernel
def test_a_split_batch_gives_the_same_rows(backend):
    """Gradients of a mean over half as many rows are twice as large, and the same bits."""
    problem = distillation_problem((8, 60), temperature=2.0)
    _, *grads = run(problem, backend)
    half = distillation_problem((8, 60), temperature=2.0)
    half.inputs = {n: t[:4] for n, t in half.inputs.items()}
    for name in ("teacher_logits", "targets"):
        half.options[name] = half.options[name][:4]
    _, *halves = run(half, backend)
    assert_bitwise_equal([2 * g[:4] for g in grads], halves)


# ---- The same bits every time


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@each_kernel
def test_repeats_are_bitwise_equal(backend, dtype):
    repeats, shape = (100, (65, 1100)) if backend == "cpu" else (5, (3, 40))
    problem = distillation_problem(shape, dtype, temperature=2.0)
    first = run(problem, backend)
    for _ in range(repeats):
        assert_bitwise_equal(run(problem, backend), first)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@each_kernel
def test_threads_do_not_change_bits(backend, kind):
    shape = (201, 1500) if backend == "cpu" else (3, 40)
    problem = distillation_problem(shape, BF16, kind=kind)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(run(problem, backend, 0.3))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])


# ---- Class ids that are none


@pytest.mark.parametrize("bad", (-1, 20, -100, 2**40))
@each_backend
def test_a_class_id_beyond_the_classes(backend, bad):
    problem = distillation_problem((6, 20))
    problem.options["targets"][4] = bad
    if backend in ("triton", "cuda"):
        loss, *grads = run(problem, backend)
        assert loss.isnan() and torch.isfinite(grads[0]).all()
        return
    with pytest.raises((IndexError, RuntimeError), match=r"[Ii]ndex|Target|targets must be class"):
        run(problem, backend)


# ---- Raw operators called directly, as exported graphs do

X, IDS = torch.randn(3, 8), torch.tensor([1, 7, 0])
FORWARD = {"logits": X, "distill_logits": X, "teacher_logits": X, "targets": IDS, "alpha": 0.5,
           "temperature": 1.0, "hard": False, "label_smoothing": 0.0, "per_class": False,
           "grad_mask": [True, True]}  # fmt: skip
BACKWARD = {"dloss": torch.tensor(0.5), "dlogits": X, "ddistill": X, "per_class": False,
            "output_mask": [True, True]}  # fmt: skip
BAD_FORWARD = {
    "logits of one dimension": {"logits": X[0]},
    "no rows": {"logits": X[:0]},
    "no classes": {"logits": X[:, :0]},
    "bool logits": {"logits": X > 0},
    "float64 logits": {"logits": X.double(), "distill_logits": X.double()},
    "distill_logits of another shape": {"distill_logits": X[:, :4]},
    "distill_logits of another dtype": {"distill_logits": X.half()},
    "teacher of another batch": {"teacher_logits": X[:2]},
    "int teacher": {"teacher_logits": X.int()},
    "targets of another batch": {"targets": IDS[:2]},
    "int32 targets": {"targets": IDS.int()},
    "targets of another shape": {"targets": X[:, :4]},
    "float64 targets": {"targets": X.double()},
    "targets of three dimensions": {"targets": X[None]},
    "alpha of 2": {"alpha": 2.0},
    "NaN alpha": {"alpha": NAN},
    "temperature of 0": {"temperature": 0.0},
    "infinite temperature": {"temperature": INF},
    "negative smoothing": {"label_smoothing": -0.1},
    "mask of one entry": {"grad_mask": [True]},
}
BAD_BACKWARD = {
    "fp16 dloss": {"dloss": torch.tensor(0.5).half()},
    "dloss of one dimension": {"dloss": torch.ones(1)},
    "dlogits absent": {"dlogits": None},
    "ddistill absent": {"ddistill": None},
    "float64 dlogits": {"dlogits": X.double()},
    "dlogits of one dimension": {"dlogits": X[0]},
    "mask of three entries": {"output_mask": [True] * 3},
}
RAW = [b for b in KERNELS if b != "cuda"]
V = torch.ops.vitkernels


@pytest.mark.parametrize("name", BAD_FORWARD)
@pytest.mark.parametrize("backend", RAW)
def test_forward_refuses(backend, name):
    call = getattr(V.distillation_loss_fwd, backend)
    with pytest.raises((RuntimeError, ValueError), match=r"distillation_loss_fwd: .* must "):
        call(*{**FORWARD, **BAD_FORWARD[name]}.values())


@pytest.mark.parametrize("name", BAD_BACKWARD)
@pytest.mark.parametrize("backend", RAW)
def test_backward_refuses(backend, name):
    call = getattr(V.distillation_loss_bwd, backend)
    with pytest.raises((RuntimeError, ValueError), match=r"distillation_loss_bwd: .* must "):
        call(*{**BACKWARD, **BAD_BACKWARD[name]}.values())


@pytest.mark.parametrize("mask", [[a, b] for a in (True, False) for b in (True, False)], ids=str)
@pytest.mark.parametrize("backend", RAW)
def test_every_mask(backend, mask):
    for call, good, key in (
        (V.distillation_loss_fwd, FORWARD, "grad_mask"),
        (V.distillation_loss_bwd, BACKWARD, "output_mask"),
    ):
        full = getattr(call, backend)(*good.values())[-2:]
        some = getattr(call, backend)(*{**good, key: mask}.values())[-2:]
        assert [t is not None for t in some] == mask
        for mine, theirs in zip(some, full, strict=True):
            assert mine is None or torch.equal(mine, theirs)
