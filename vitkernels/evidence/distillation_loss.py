"""distillation_loss: DeiT's soft and hard distillation, and mixup's targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import ops
from ..ops.distillation_loss import reference
from .subject import Subject, normal

ALPHA = 0.5
TEMPERATURE = 3.0


def subject(op, shape, device="cpu", kind="soft", mixup=False) -> Subject:
    """shape: (B, K). mixup: targets are probabilities of two classes, else class ids."""
    hard, smoothing = kind == "hard", 0.1 if mixup else 0.0

    def ours(backend):
        def call(*tensors):
            options = {"alpha": ALPHA, "temperature": TEMPERATURE, "kind": kind}
            options |= {"label_smoothing": smoothing, "backend": backend}
            return ops.distillation_loss(*tensors, **options)

        return call

    def eager(logits, distill_logits, teacher_logits, targets):
        """What DeiT's DistillationLoss does, with the batch's mean."""
        base, T = F.cross_entropy(logits, targets, label_smoothing=smoothing), TEMPERATURE
        if hard:
            other = F.cross_entropy(distill_logits, teacher_logits.argmax(1))
        else:
            student, teacher = (F.log_softmax(t / T, 1) for t in (distill_logits, teacher_logits))
            other = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * (T * T)
        return (1 - ALPHA) * base + ALPHA * other

    def truth(*tensors):
        options = (ALPHA, TEMPERATURE, hard, smoothing, False)
        return reference.distillation_loss(*tensors, *options)

    def make(seed, dtype, device="cpu"):
        random, (B, K) = normal(seed, device), shape
        teacher = 2.0 * random(B, K)
        logits, distill_logits = 2.0 * random(B, K), 0.5 * teacher + random(B, K)
        floats = [t.to(dtype) for t in (logits, distill_logits, teacher)]
        classes, other = (1e6 * random(2, B)).long() % K
        if not mixup:
            return [*floats, classes]
        share = random(B, 1).sigmoid()
        pairs = share * F.one_hot(classes, K) + (1 - share) * F.one_hot(other, K)
        return [*floats, pairs.to(dtype)]

    def cost(size, backward):
        """The forward makes the gradients: of the five tensors the backward's are two."""
        flops, moved = reference.cost(shape, size, gradient=backward)
        targets = torch.Size(shape).numel() * size if mixup else 8 * shape[0]
        if not backward:
            return flops, moved + targets
        before = reference.cost(shape, size)
        return flops - before[0], moved - before[1]

    sizes = (shape[1],)
    return Subject(op, tuple(shape), make, ours, eager, truth, cost, sizes, with_gradient=2)
