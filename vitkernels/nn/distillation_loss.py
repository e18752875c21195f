"""The loss of DeiT: cross entropy of the class head, distillation of the other one."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class DistillationLoss(nn.Module):
    """loss = criterion(model(images), targets, teacher_logits); see ops.distillation_loss.

    outputs: the pair (logits, distill_logits) of a FusedDeiT in distilled training, or the logits
    of a model with one head, which is then trained by both parts. Touvron et al. 2021, section 4.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        kind: str = "soft",
        label_smoothing: float = 0.0,
        reduction: str = "batchmean",
    ):
        super().__init__()
        self.alpha, self.temperature, self.kind = alpha, temperature, kind
        self.label_smoothing, self.reduction = label_smoothing, reduction

    def forward(
        self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, teacher_logits: Tensor
    ) -> Tensor:
        logits, distill_logits = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        return ops.distillation_loss(
            logits, distill_logits, teacher_logits, targets, alpha=self.alpha,
            temperature=self.temperature, kind=self.kind, label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha!r}, temperature={self.temperature!r}, kind={self.kind!r}, "
            f"label_smoothing={self.label_smoothing!r}, reduction={self.reduction!r}"
        )
