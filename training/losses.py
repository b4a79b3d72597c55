"""The training loss: DeiT's choice by augmentation, and distillation from a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


def base_criterion(mixed: bool, smoothing: float) -> nn.Module:
    """Cross-entropy for the targets at hand: Mixup's are soft and carry the smoothing already."""
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """(1 - alpha) base + alpha distillation on the student's second head (Touvron et al. 2021, section 3).

    `soft`: KL divergence between the two distributions at temperature tau, times tau^2. `hard`: cross-entropy with
    the teacher's decision. The student returns (class logits, distillation logits), each [batch, classes].
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base, self.teacher, self.kind, self.alpha, self.tau = base, teacher.eval(), kind, alpha, tau

    def forward(self, images: Tensor, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        logits, distilled = outputs
        with torch.no_grad():
            taught = self.teacher(images)
        if self.kind == "soft":
            student = F.log_softmax(distilled / self.tau, dim=1)
            teacher = F.log_softmax(taught / self.tau, dim=1)
            # A mean over all entries, as DeiT has it, not over the batch.
            loss = F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2 / distilled.numel()
        else:
            loss = F.cross_entropy(distilled, taught.argmax(dim=1))
        return (1 - self.alpha) * self.base(logits, targets) + self.alpha * loss
