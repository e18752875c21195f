"""Problems of distillation_loss, and the plain PyTorch they are measured by: the formulas of the
original DeiT repository."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from problems import Problem

from vitkernels import testing
from vitkernels.ops.distillation_loss import reference


@dataclasses.dataclass
class DistillationProblem(Problem):
    """The teacher's logits and the targets are options: they get no gradient.

    16-bit gradients are rounded where the forward makes them, and again when the backward has
    multiplied them, unless by a power of two; plain PyTorch rounds once.
    """

    by_power_of_two: bool = False

    def slack_of(self, names):
        twice = self.precision in testing.SIXTEEN_BIT and names != self.outputs
        return 2.0 if twice and not self.by_power_of_two else 1.0

    def laid_out(self, layout):
        laid = super().laid_out(layout)
        teacher = testing.in_layout(self.options["teacher_logits"], layout)
        targets = self.options["targets"]
        if targets.is_floating_point():
            targets = testing.in_layout(targets, layout)
        options = self.options | {"teacher_logits": teacher, "targets": targets}
        return dataclasses.replace(laid, options=options)

    def double(self):
        doubled, names = super().double(), ("teacher_logits", "targets")
        wide = {name: self.options[name] for name in names}
        wide = {n: t.double() if t.is_floating_point() else t for n, t in wide.items()}
        return dataclasses.replace(doubled, options=doubled.options | wide)


def distillation_problem(
    shape,
    dtype=torch.float32,
    *,
    teacher_dtype=None,
    soft_targets=None,
    autocast=None,
    spread=2.0,
    seed=5,
    **options,
) -> DistillationProblem:
    """`shape` is (B, K). soft_targets: None for class ids, or a dtype for probabilities as mixup
    makes them: two classes of a row share its weight, label smoothing beside them."""
    generator = torch.Generator().manual_seed(seed)
    B, K = shape

    def normal():
        return torch.randn(shape, generator=generator)

    teacher = spread * normal()
    inputs = {
        "logits": (spread * normal() + 3.0).to(dtype),
        "distill_logits": (0.5 * teacher + spread * normal() - 1.0).to(dtype),
    }
    targets = torch.randint(0, K, (B,), generator=generator)
    if soft_targets is not None:
        other = torch.randint(0, K, (B,), generator=generator)
        share = torch.rand(B, 1, generator=generator)
        targets = share * F.one_hot(targets, K) + (1 - share) * F.one_hot(other, K)
        targets = targets.to(soft_targets)
    defaults = {
        "alpha": 0.4, "temperature": 1.0, "kind": "soft", "label_smoothing": 0.0,
        "reduction": "batchmean",
    }  # fmt: skip
    tensors = {"teacher_logits": teacher.to(teacher_dtype or dtype), "targets": targets}
    return DistillationProblem(
        "distillation_loss",
        inputs,
        tensors | defaults | options,
        spec_distillation_loss,
        eager_distillation_loss,
        ("loss",),
        (("logits",), ("distill_logits",)),
        dtype,
        seed,
        autocast,
    )


def spec_distillation_loss(
    *, logits, distill_logits, teacher_logits, targets, alpha, temperature, kind, label_smoothing,
    reduction, seed,
):  # fmt: skip
    """The truth: the specification, differentiated by autograd."""
    per_class = reduction == "deit" and kind == "soft"
    return reference.distillation_loss(
        logits, distill_logits, teacher_logits, targets, alpha, temperature, kind == "hard",
        label_smoothing, per_class,
    )  # fmt: skip


def eager_distillation_loss(
    *, logits, distill_logits, teacher_logits, targets, alpha, temperature, kind, label_smoothing,
    reduction, seed=None,
):  # fmt: skip
    """The yardstick: the original's DistillationLoss in the tested dtype, with the batch's mean
    beside its division by every element."""
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    base = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    T, teacher_logits = temperature, teacher_logits.to(logits.dtype)
    if kind == "hard":
        distillation = F.cross_entropy(distill_logits, teacher_logits.argmax(dim=1))
    else:
        distillation = (
            F.kl_div(
                F.log_softmax(distill_logits / T, dim=1),
                F.log_softmax(teacher_logits / T, dim=1),
                reduction="sum",
                log_target=True,
            )
            * (T * T)
            / (distill_logits.numel() if reduction == "deit" else len(logits))
        )
    return base * (1 - alpha) + distillation * alpha
