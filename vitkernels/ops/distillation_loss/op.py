"""distillation_loss: public function, backends, schemas, fakes, autograd."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ... import _checks
from ..._autograd import once_differentiable
from ..._dispatch import (
    Backend,
    choose,
    declare,
    keep_signature,
    needs_autograd,
    overload,
)
from . import reference

Tensor = torch.Tensor
EVERY_FLOAT = _checks.FLOAT_DTYPES
KINDS = ("soft", "hard")
REDUCTIONS = ("batchmean", "deit")
NO_CLASS = torch.iinfo(torch.int64).min  # what cross_entropy ignores: it would take -100 for that


# Order of preference. The teacher's logits and soft targets each have their own dtype.
BACKENDS = (
    Backend("cpu"),
    Backend("cuda"),
    Backend("triton"),
    Backend("torch", EVERY_FLOAT),
    Backend("reference", EVERY_FLOAT),
)


def distillation_loss(
    logits: Tensor,
    distill_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    kind: str = "soft",
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """DeiT's loss in one pass over the logits: the gradients are made in the forward.

    ``(1 - alpha) * CE(logits, targets) + alpha * distillation(distill_logits, teacher_logits)``;
    distillation is ``temperature^2 * KL(softmax(teacher / temperature) || softmax(distill /
    temperature))`` (soft) or ``CE(distill_logits, argmax(teacher_logits))`` (hard); batch means.

    Args:
        logits, distill_logits: (B, K), of the class head and of the distillation head, of one
        dtype: fp32, bf16, fp16 (float64: reference). One head may be both. Any strides.
        teacher_logits: (B, K), any of these dtypes; no gradient.
        targets: (B,) class ids (int64, int32), or (B, K) probabilities (mixup, cutmix).
        alpha: weight of the distillation, in [0, 1]. temperature: positive; soft only.
        label_smoothing: of the targets, in [0, 1].
        reduction: "batchmean", or "deit": KL divided by B * K instead of B, as the original
        repository does, which makes it K times smaller.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        The loss, a scalar in fp32 (float64 of float64 logits).

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.
        IndexError, RuntimeError: a class id outside [0, K), on a CPU; on a GPU the loss is NaN.

    Source: Touvron et al. 2021, section 4 (DeiT); Hinton et al. 2015.
    """
    _check(logits, distill_logits, teacher_logits, targets)
    _check_options(alpha, temperature, kind, label_smoothing, reduction)
    targets = targets.to(torch.int64) if targets.ndim == 1 else targets
    tensors = (logits, distill_logits, teacher_logits, targets)
    dtypes = tuple(t.dtype for t in tensors if t.is_floating_point())
    wanted = needs_autograd(logits, distill_logits)
    chosen = choose(
        "distillation_loss", BACKENDS, backend, logits.device, dtypes, training=wanted,
        sizes=(logits.shape[1],),
    )  # fmt: skip
    per_class = reduction == "deit" and kind == "soft"
    options = (float(alpha), float(temperature), kind == "hard", float(label_smoothing), per_class)
    if chosen == "torch":
        return _stock(*tensors, *options)
    if wanted:
        grad_mask = [logits.requires_grad, distill_logits.requires_grad]
        return _DistillationLoss.apply(chosen, *tensors, *options, grad_mask)[0]
    return overload("distillation_loss_fwd", chosen)(*tensors, *options, [False, False])[0]


# --- checks ---------------------------------------------------------------------------------------


def _check(logits, distill_logits, teacher_logits, targets):
    op = "distillation_loss"
    _checks.tensor(op, "logits", logits, ndim=2, meaning="(B, K)")
    if 0 in logits.shape:
        _checks.fail(op, "logits", "of shape (B, K) with B, K >= 1", _checks.describe(logits))
    shape = {"like": logits, "shape": tuple(logits.shape), "meaning": "(B, K)"}
    _checks.tensor(op, "distill_logits", distill_logits, dtypes=(logits.dtype,), **shape)
    _checks.tensor(op, "teacher_logits", teacher_logits, **shape)
    classes = (torch.int64, torch.int32)
    _checks.tensor(op, "targets", targets, like=logits, dtypes=(*EVERY_FLOAT, *classes))
    if targets.is_floating_point():
        _checks.tensor(op, "targets", targets, **shape)
    else:
        shape |= {"shape": (logits.shape[0],), "meaning": "(B,) class ids"}
        _checks.tensor(op, "targets", targets, dtypes=classes, **shape)
    _checks.no_grad_tensor(op, "teacher_logits", teacher_logits)
    _checks.no_grad_tensor(op, "targets", targets)


def _check_options(alpha, temperature, kind, label_smoothing, reduction):
    op, just_above = "distillation_loss", math.nextafter(1.0, 2.0)
    for name, share in (("alpha", alpha), ("label_smoothing", label_smoothing)):
        _checks.number(op, name, share, low=0.0, high=just_above, expected="a number in [0, 1]")
    _checks.number(
        op, "temperature", temperature, low=0.0, high=math.inf, low_open=True,
        expected="a positive finite number",
    )  # fmt: skip
    for name, value, known in (("kind", kind, KINDS), ("reduction", reduction, REDUCTIONS)):
        if not isinstance(value, str) or value not in known:
            _checks.fail(op, name, f"one of {[*known]}", _checks.describe(value))


# --- backend "torch": stock operators, visible to autograd and torch.compile ----------------------


def _stock(
    logits, distill_logits, teacher_logits, targets, alpha, temperature, hard, label_smoothing,
    per_class,
):  # fmt: skip
    """What autocast makes of the original code: every operator in fp32."""
    logits, distill_logits, teacher_logits = map(
        reference.widen, (logits, distill_logits, teacher_logits)
    )
    if targets.ndim == 2:
        targets = targets.to(logits.dtype)
    base = F.cross_entropy(logits, targets, ignore_index=NO_CLASS, label_smoothing=label_smoothing)
    if hard:
        largest, decision = teacher_logits.max(1)
        valid = torch.where(largest.isnan(), torch.nan, 1.0).to(logits.dtype)
        distillation = (F.cross_entropy(distill_logits, decision, reduction="none") * valid).mean()
    else:
        student = F.log_softmax(distill_logits / temperature, 1)
        teacher = F.log_softmax(teacher_logits / temperature, 1)
        # Not kl_div: it makes NaN of a class that the teacher excludes.
        total = reference.weighted(teacher.exp(), teacher - student).sum()
        rows = logits.numel() if per_class else logits.shape[0]
        distillation = (total * (temperature * temperature / rows)).to(logits.dtype)
    return (1 - alpha) * base + alpha * distillation


# --- raw operators --------------------------------------------------------------------------------


def _fake_distillation_loss_fwd(
    logits, distill_logits, teacher_logits, targets, alpha, temperature, hard, label_smoothing,
    per_class, grad_mask,
):  # fmt: skip
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    kept = (logits.new_empty(logits.shape) if wanted else None for wanted in grad_mask)
    return logits.new_empty((), dtype=dtype), *kept


def _fake_distillation_loss_bwd(dloss, dlogits, ddistill, per_class, output_mask):
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip((dlogits, ddistill), output_mask, strict=True)
    )


def _regime_of_bwd(dloss, dlogits, ddistill, *_):
    kept = dlogits if dlogits is not None else ddistill
    return "distillation_loss", (0 if kept is None else kept.shape[1],), ""


declare(
    "distillation_loss_fwd",
    "(Tensor logits, Tensor distill_logits, Tensor teacher_logits, Tensor targets, float alpha,"
    " float temperature, bool hard, float label_smoothing, bool per_class, bool[] grad_mask)"
    " -> (Tensor loss, Tensor? dlogits, Tensor? ddistill)",
    fake=_fake_distillation_loss_fwd,
    reference=reference.distillation_loss_fwd,
    regime=lambda logits, *_: ("distillation_loss", (logits.shape[1],), ""),
)
declare(
    "distillation_loss_bwd",
    "(Tensor dloss, Tensor? dlogits, Tensor? ddistill, bool per_class, bool[] output_mask)"
    " -> (Tensor? dlogits, Tensor? ddistill)",
    fake=_fake_distillation_loss_bwd,
    reference=reference.distillation_loss_bwd,
    regime=_regime_of_bwd,
)


# --- autograd -------------------------------------------------------------------------------------


@keep_signature
class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("distillation_loss_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        # Not marked as without gradients: they lead a second derivative to its refusal.
        _, dlogits, ddistill = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlogits, ddistill)
        ctx.backend, ctx.per_class = inputs[0], inputs[9]

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dloss, _dlogits, _ddistill):
        if dloss is None:
            return (None,) * 11
        output_mask = list(ctx.needs_input_grad[1:3])
        kept = [None if t is None else t.detach() for t in saved]
        if _is_one(dloss, kept) and not _graph_is_kept():
            grads = [t if wanted else None for t, wanted in zip(kept, output_mask, strict=True)]
        else:
            scale = overload("distillation_loss_bwd", ctx.backend)
            grads = scale(dloss, *kept, ctx.per_class, output_mask)
        return None, *grads, *(None,) * 8


def _is_one(dloss: Tensor, kept: list[Tensor | None]) -> bool:
    """Whether the kept gradients are the wanted ones, as after `loss.backward()`: seen where
    looking at the number costs nothing."""
    return (
        not torch.compiler.is_compiling()
        and dloss.device.type == "cpu"
        and type(dloss) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(dloss)
        and all(t is None or t.dtype != torch.float16 for t in kept)
        and dloss.item() == 1.0
    )


def _graph_is_kept() -> bool:
    """Whether this backward may come again (retain_graph), and find its tensors written to: a
    leaf's .grad takes over the tensor it is given."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()
