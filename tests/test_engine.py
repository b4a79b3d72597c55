"""The training step's gradient clipping, and the numbers that an epoch and an evaluation report."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from data.image_files import LEFT_OUT
from engine import EpochSums, TrainStep, autocast, evaluate, train_one_epoch
from quantization import RampingAdamW
from training.losses import OutputLoss

OPTIMIZERS = [torch.optim.AdamW, RampingAdamW]


def build(optimizer: type[torch.optim.Optimizer], clip_grad: float, device: torch.device) -> TrainStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    return TrainStep(
        model, OutputLoss(nn.CrossEntropyLoss()), optimizer(model.parameters(), lr=0.1), device, clip_grad=clip_grad
    )


@pytest.fixture
def batch(randn, device):
    return 20 * randn(16, 6), torch.arange(16, device=device) % 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("share", [0.25, 4.0])
def test_the_norm_of_all_gradients_together_is_limited(optimizer, share, batch, device):
    """The optimizer gets g * min(1, limit / |g|), with |g| over every parameter; below the limit not a bit changes."""
    free = build(optimizer, 0.0, device)
    before = copy.deepcopy(free.model)
    free(batch)
    gradients = [p.grad for p in free.model.parameters()]
    norm = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    assert norm > 1  # far above the 1e-6 that PyTorch adds to it
    clipped = build(optimizer, share * norm, device)
    clipped(batch)
    wanted = [g * min(1.0, share) for g in gradients]
    for p, gradient in zip(clipped.model.parameters(), wanted):
        tolerance = 0 if share > 1 else 1e-5
        assert torch.allclose(p.grad, gradient, rtol=tolerance, atol=0)
    for p, clipped_p in zip(before.parameters(), clipped.model.parameters()):
        p.grad = clipped_p.grad.clone()
    optimizer(before.parameters(), lr=0.1).step()
    for p, clipped_p in zip(before.parameters(), clipped.model.parameters()):
        assert torch.equal(p, clipped_p)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_that_a_callback_replaces_are_clipped(optimizer, batch, device):
    step = build(optimizer, 0.3, device)

    def enlarge() -> None:
        for p in step.model.parameters():
            p.grad = 1e6 * p.grad

    step.before_update = enlarge
    step(batch)
    norm = torch.cat([p.grad.double().flatten() for p in step.model.parameters()]).norm().item()
    assert norm == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_as_torchs_own_over_several_steps(optimizer, batch, device):
    ours, reference = build(optimizer, 0.3, device), build(optimizer, 0.0, device)
    for _ in range(3):
        ours(batch)
        reference.optimizer.zero_grad()
        with autocast(device):
            loss = reference.criterion(batch[0], reference.model(batch[0]), batch[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 0.3)
        reference.optimizer.step()
    for p, q in zip(ours.model.parameters(), reference.model.parameters()):
        assert torch.equal(p, q)


def ranked(labels: list[int], ranks: list[int]) -> Tensor:
    """Logits of 8 classes that give the label of image i the rank `ranks[i]`.

    The probability of rank r is 2**-r, that of the last rank 2**-7, so the cross-entropy of an image whose label has a
    rank up to 7 is r ln 2. Another constant is added for each image, which changes no probability.
    """
    by_rank = [-math.log(2) * rank for rank in (1, 2, 3, 4, 5, 6, 7, 7)]
    rows = []
    for image, (label, rank) in enumerate(zip(labels, ranks, strict=True)):
        others = [by_rank[i] for i in range(8) if i != rank - 1]
        rows.append([image + x for x in (*others[:label], by_rank[rank - 1], *others[label:])])
    return torch.tensor(rows, dtype=torch.float64)


def loader_of(logits: Tensor, labels: list[int], batch_size: int) -> DataLoader:
    """The images are logits, for models that return their input."""
    return DataLoader(TensorDataset(logits, torch.tensor(labels)), batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_evaluation_counts_ranks_1_to_5_and_averages_over_images(batch_size, device):
    """The labels have ranks 1, 5, 6, 5 and 2: one of five images is right, and four have it among the best five."""
    labels, ranks = [3, 0, 7, 4, 6], [1, 5, 6, 5, 2]
    numbers = evaluate(nn.Identity(), loader_of(ranked(labels, ranks), labels, batch_size), device)
    assert numbers == {"loss": pytest.approx(19 / 5 * math.log(2)), "acc1": 20.0, "acc5": 80.0}


@pytest.mark.parametrize("rank", range(1, 8))
def test_one_image_is_right_at_rank_1_and_among_the_best_five_up_to_rank_5(rank, device):
    numbers = evaluate(nn.Identity(), loader_of(ranked([2], [rank]), [2], 1), device)
    wanted = {"acc1": 100.0 if rank == 1 else 0.0, "acc5": 100.0 if rank <= 5 else 0.0}
    assert numbers == {"loss": pytest.approx(rank * math.log(2)), **wanted}


def test_with_fewer_than_five_classes_every_image_is_among_the_best_five(device):
    """The classes have the probabilities 4/7, 2/7 and 1/7, and the labels have the ranks 1, 2, 3 and 3."""
    labels = [1, 0, 2, 2]
    logits = torch.tensor([[2.0, 4.0, 1.0]] * 4).log()
    numbers = evaluate(nn.Identity(), loader_of(logits, labels, 3), device)
    wanted = (math.log(7 / 4) + math.log(7 / 2) + 2 * math.log(7)) / 4
    assert numbers == {"loss": pytest.approx(wanted), "acc1": 25.0, "acc5": 100.0}


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_images_that_are_left_out_count_nowhere(batch_size, device):
    """Three images have labels of ranks 1, 5 and 6. The other three are left out, two of them in one batch."""
    ranks, labels = [1, 1, 5, 3, 2, 6], [0, 5, 7, 1, 4, 2]
    logits = ranked(labels, ranks)
    labels[1] = labels[3] = labels[4] = LEFT_OUT
    order = [0, 1, 3, 4, 2, 5]
    loader = loader_of(logits[order], [labels[i] for i in order], batch_size)
    numbers = evaluate(nn.Identity(), loader, device)
    wanted = {"acc1": pytest.approx(100 / 3), "acc5": pytest.approx(200 / 3)}
    assert numbers == {"loss": pytest.approx(4 * math.log(2)), **wanted}


class Shifted(nn.Module):
    """Returns its input plus a parameter that stays 0."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.shift


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_epoch_reports_the_means_over_its_images(batch_size, device):
    """The labels have ranks 1, 5, 6, 1 and 2, so two of five images are right, whatever the size of the last batch."""
    labels, ranks = [3, 0, 7, 4, 6], [1, 5, 6, 1, 2]
    model = Shifted().to(device)
    step = TrainStep(model, OutputLoss(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.0), device)
    loader = loader_of(ranked(labels, ranks).float(), labels, batch_size)
    numbers = train_one_epoch(step, loader, 0, 1, lambda: None)
    assert numbers["train_loss"] == pytest.approx(15 / 5 * math.log(2), rel=1e-5)
    assert (numbers["train_acc1"], numbers["lr"], numbers["skipped_steps"]) == (pytest.approx(40.0), 0.0, 0)


class TestEpochSums:
    @staticmethod
    def step() -> TrainStep:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        return TrainStep(
            model, OutputLoss(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.0), torch.device("cpu")
        )

    def test_means_are_over_images_where_batches_differ_in_size(self):
        step = self.step()
        images, labels = torch.randn(9, 6), torch.arange(9) % 3
        numbers = train_one_epoch(step, list(zip(images.split(7), labels.split(7))), 0, 1, lambda: None)
        logits = step.model(images).detach().double()
        assert numbers["train_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
        right = sum(int(row.argmax()) == label for row, label in zip(logits, labels.tolist()))
        assert numbers["train_acc1"] == pytest.approx(100 * right / 9) and 0 < right < 9

    def test_images_per_second_are_over_the_whole_epoch_also_in_a_run_that_goes_on(self):
        """16 images in 50 seconds before it went on, 16 in a moment after that."""
        loader = [(torch.randn(8, 6), torch.arange(8) % 3)] * 2
        sums = EpochSums(steps=2, images=16, seconds=50.0)
        speed = train_one_epoch(self.step(), loader, 0, 1, lambda: None, sums)["img_per_s"]
        assert 32 / 60 < speed <= 32 / 50
