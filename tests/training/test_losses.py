"""The training losses against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.base import Preprocessing
from training.losses import DistillationLoss, Renormalization, base_criterion


def test_base_criterion_by_target():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    assert torch.equal(base_criterion(False, 0.0)(None, logits, labels), F.cross_entropy(logits, labels))
    smooth = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(base_criterion(False, 0.1)(None, logits, labels), smooth)
    soft = torch.softmax(torch.randn(6, 5), dim=1)
    assert torch.allclose(base_criterion(True, 0.1)(None, logits, soft), F.cross_entropy(logits, soft))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(kind):
    torch.manual_seed(0)
    teacher = nn.Linear(8, 5)
    images, labels = torch.randn(6, 8), torch.arange(6) % 5
    logits, distilled = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    loss = DistillationLoss(base_criterion(False, 0.0), teacher, kind, alpha=0.3, tau=2.0)
    got = loss(images, (logits, distilled), labels)
    taught = teacher(images).detach()
    if kind == "soft":
        p, q = torch.softmax(taught / 2, 1), torch.softmax(distilled / 2, 1)
        expected = (p * (p.log() - q.log())).sum() * 4 / 30
    else:
        expected = F.cross_entropy(distilled, taught.argmax(1))
    assert torch.allclose(got, 0.7 * F.cross_entropy(logits, labels) + 0.3 * expected)
    got.backward()
    assert teacher.weight.grad is None and logits.grad is not None and distilled.grad is not None


def test_a_teachers_copy_of_the_batch_is_normalized_anew():
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)

    def normalized(mean: tuple, std: tuple) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    ours, theirs = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.4, 0.3), (0.5, 0.25, 1.0))
    renormalize = Renormalization(Preprocessing(*ours), Preprocessing(*theirs)).double()
    assert torch.allclose(renormalize(normalized(*ours)), normalized(*theirs), atol=1e-6)
