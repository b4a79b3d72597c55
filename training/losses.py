"""The training losses: DeiT's choice by augmentation, and distillation from a teacher.

Every criterion is called with (images, outputs, targets), so that the engine need not know which one it has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from data.base import Preprocessing

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images [batch, 3, height, width], outputs, targets) -> loss, a scalar."""


class OutputLoss(nn.Module):
    """A criterion from a `loss` of outputs and targets alone."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets)


def base_criterion(mixed: bool, smoothing: float) -> OutputLoss:
    """Cross-entropy for the targets at hand: Mixup's are soft and carry the smoothing already."""
    if mixed:
        return OutputLoss(SoftTargetCrossEntropy())
    return OutputLoss(LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss())


class Renormalization(nn.Module):
    """Turns images that are normalized for one model into images normalized for another; fp32 [B, 3, height, width]."""

    def __init__(self, ours: Preprocessing, theirs: Preprocessing) -> None:
        super().__init__()
        (our_mean, our_std), (mean, std) = ((torch.tensor(p.mean), torch.tensor(p.std)) for p in (ours, theirs))
        self.register_buffer("scale", (our_std / std).view(3, 1, 1))
        self.register_buffer("shift", ((our_mean - mean) / std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


class DistillationLoss(nn.Module):
    """(1 - alpha) base + alpha distillation on the student's second head (Touvron et al. 2021, section 3).

    `soft`: KL divergence between the two distributions at temperature tau, times tau^2. `hard`: cross-entropy with
    the teacher's decision. The student returns (class logits, distillation logits), each [batch, classes].
    """

    def __init__(self, base: Criterion, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
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
        return (1 - self.alpha) * self.base(images, logits, targets) + self.alpha * loss
