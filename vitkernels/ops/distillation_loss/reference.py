"""The specification of distillation_loss: plain PyTorch, obvious, correct in float64.

Corner cases that every backend follows: a class whose target (or whose teacher probability) is 0
adds nothing to the loss, even where the student's logit is -inf; hard distillation takes the first
of equal largest teacher logits, and a NaN among them makes the row's loss NaN. A row without a
finite logit, or with one of +inf, is NaN, as in log_softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

# A gradient is kept in the logits' dtype from forward to backward. A mean's gradients are of the
# size of fp16's subnormals, and the loss scaling that saves them comes in the backward only: so in
# fp16 they are kept larger, by this and by the power of two from the batch (times classes) on.
FP16_UNIT = 1024


def distillation_loss(
    logits, distill_logits, teacher_logits, targets, alpha, temperature, hard, label_smoothing,
    per_class,
):  # fmt: skip
    """(1 - alpha) * cross entropy of `logits` + alpha * distillation of `distill_logits`.

    hard: cross entropy with the teacher's decision; else KL(teacher || student) at `temperature`,
    times its square. The batch's mean; per_class divides KL by the number of classes, too.
    """
    logits, distill_logits, teacher_logits = map(widen, (logits, distill_logits, teacher_logits))
    B, K = logits.shape
    target = smooth(targets, K, label_smoothing, logits.dtype)
    base = cross_entropy(logits, target).sum() / B
    if hard:
        decision = smooth(teacher_logits.argmax(1), K, 0.0, logits.dtype)
        valid = torch.where(teacher_logits.isnan().any(1), torch.nan, 1.0)
        rows = cross_entropy(distill_logits, decision) * valid.to(logits.dtype)
        return (1 - alpha) * base + alpha * (rows.sum() / B)
    log_teacher = F.log_softmax(teacher_logits / temperature, 1)
    log_student = F.log_softmax(distill_logits / temperature, 1)
    kl = weighted(log_teacher.exp(), log_teacher - log_student).sum() * temperature**2
    return (1 - alpha) * base + alpha * (kl / (B * K if per_class else B))


def smooth(targets: Tensor, K: int, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """Class ids (B,) or probabilities (B, K) as probabilities, label_smoothing / K added to all."""
    if targets.ndim == 1:
        targets = torch.zeros(len(targets), K, dtype=dtype, device=targets.device).scatter(
            1, targets[:, None], 1.0
        )
    return (1 - label_smoothing) * targets.to(dtype) + label_smoothing / K


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of each row, in nats."""
    return weighted(target, -F.log_softmax(logits, 1)).sum(1)


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is 0 whatever the value."""
    return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, value))


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def units(dtype: torch.dtype, B: int, K: int, per_class: bool) -> tuple[float, float]:
    """How many times the gradients of logits and distill_logits are kept enlarged."""
    if dtype != torch.float16:
        return 1.0, 1.0
    counts = B, B * K if per_class else B
    of_class, of_distillation = (float(FP16_UNIT << (count - 1).bit_length()) for count in counts)
    return of_class, of_distillation


# --- raw operators --------------------------------------------------------------------------------


def distillation_loss_fwd(
    logits, distill_logits, teacher_logits, targets, alpha, temperature, hard, label_smoothing,
    per_class, grad_mask,
):  # fmt: skip
    options = (alpha, temperature, hard, label_smoothing, per_class)
    tensors = (logits, distill_logits, teacher_logits, targets)
    loss = distillation_loss(*tensors, *options).to(widen(logits).dtype)
    kept = [
        (grad * unit).to(logits.dtype) if wanted else None
        for grad, unit, wanted in zip(
            gradients(*tensors, *options), units(logits.dtype, *logits.shape, per_class),
            grad_mask, strict=True,
        )
    ]  # fmt: skip
    return loss, *kept


def gradients(
    logits, distill_logits, teacher_logits, targets, alpha, temperature, hard, label_smoothing,
    per_class,
):  # fmt: skip
    """What autograd makes of distillation_loss: of logits, and of distill_logits."""
    logits, distill_logits, teacher_logits = map(widen, (logits, distill_logits, teacher_logits))
    B, K = logits.shape
    target = smooth(targets, K, label_smoothing, logits.dtype)
    dlogits = logits.softmax(1) * target.sum(1, keepdim=True) - target
    if hard:
        decision = smooth(teacher_logits.argmax(1), K, 0.0, logits.dtype)
        valid = torch.where(teacher_logits.isnan().any(1, keepdim=True), torch.nan, 1.0)
        ddistill = (distill_logits.softmax(1) - decision) * valid.to(logits.dtype)
    else:
        student = (distill_logits / temperature).softmax(1)
        ddistill = (student - (teacher_logits / temperature).softmax(1)) * temperature
    return dlogits * ((1 - alpha) / B), ddistill * (alpha / (B * K if per_class else B))


def distillation_loss_bwd(dloss, dlogits, ddistill, per_class, output_mask):
    kept = (dlogits, ddistill)
    like = next((t for t, wanted in zip(kept, output_mask, strict=True) if wanted), None)
    if like is None:
        return None, None
    return tuple(
        (widen(t) * (dloss / unit)).to(t.dtype).contiguous() if wanted else None
        for t, unit, wanted in zip(
            kept, units(like.dtype, *like.shape, per_class), output_mask, strict=True
        )
    )


# --- what tests, benchmarks and profilers share ---------------------------------------------------


def sample_inputs():
    """(name, (rows, classes)) people meet."""
    return [
        ("cifar", (1024, 10)),
        ("imagenet", (1024, 1000)),
        ("imagenet_small_batch", (64, 1000)),
        ("imagenet21k", (512, 21841)),
        ("dino_prototypes", (256, 65536)),
    ]


def cost(shape, item_bytes=4, *, gradient=False):
    """(FLOPs, least bytes) of one call: three tensors read once, with gradient two written once.

    An exponential counts as 20 operations.
    """
    elements = shape[0] * shape[1]
    return elements * (3 * 20 + (16 if gradient else 10)), elements * item_bytes * (
        5 if gradient else 3
    )
