"""One training step, one epoch, one evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.feed import Feed
from data.image_files import LEFT_OUT
from quantization import RampingAdamW, quant_linears, weights_quantized_once
from quantization.shards import local
from runtime import processes
from runtime.cuda_graph import CudaGraph
from runtime.errors import NonFiniteSteps
from runtime.nonfinite import MOST_IN_A_ROW, Skips, StepRecord, report, running_statistics
from runtime.sharding import is_sharded_model

CHECK_EVERY = 10  # steps between two looks at the loss; on a GPU each look waits for the device
Batch = tuple[Tensor, Tensor]


@dataclass
class TrainStep:
    """Forward, backward and optimizer step on one batch; Q-Ramping's detection takes the very same step.

    A step with a non-finite loss or gradient is skipped: parameters, optimizer state and running statistics keep their
    bits. On a GPU, `RampingAdamW` and PyTorch's fused optimizers read the decision there; with any other optimizer,
    each step waits for the device.
    """

    model: nn.Module
    """With several processes: a DDP model, a sharded one, or one whose gradients the step averages by itself."""
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The loss of (images, outputs, targets)."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    mixup: Mixup | None = None
    before_update: Callable[[], None] | None = None
    """Called after the backward pass, before gradients are clipped and used."""
    clip_grad: float = 0.0
    """Largest norm of all gradients together; larger gradients are scaled down to it. 0 switches clipping off."""
    cuda_graph: bool = False
    """Replay forward and backward pass as one CUDA graph."""
    skips: Skips = field(default_factory=Skips)
    skip: Tensor | None = field(default=None, init=False)
    """1 if the newest step was skipped, else 0: an fp32 scalar on the device."""
    place: str = field(default="the start", init=False)
    """Position of the next step (epoch and step), quoted in NonFiniteSteps."""
    accumulate_steps: int = 1
    """Number of micro-batches into which a batch is cut. The gradient stays that of the mean over the batch, even if
    micro-batches differ in size by one image. A batch of fewer images has fewer micro-batches."""

    def __post_init__(self) -> None:
        self._statistics = running_statistics(self.model)
        self._sharded = is_sharded_model(self.model)
        parallel = self._sharded or isinstance(self.model, DistributedDataParallel)
        self._averages = processes.world_size() > 1 and not parallel
        if self._averages:  # as DDP does
            processes.check_same_parameters(self.model)
        self._passes = self._forward_and_backward
        if self.cuda_graph:
            tensors = [*self.model.parameters(), *self.model.buffers()]
            layers = list(quant_linears(self.model).values())

            def state() -> tuple:
                modes = ((layer.recipe, layer.use_q_ema, layer.high_precision) for layer in layers)
                return self.model.training, *modes, *(tensor.data_ptr() for tensor in tensors)

            self._passes = CudaGraph(self._forward_and_backward, self.model.parameters(), state)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the loss and the number of right answers, as tensors on the device.

        Raises NonFiniteSteps, and changes nothing, if too many steps before this one were skipped.
        """
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        targets = labels
        if self.mixup is not None and len(images) % 2 == 0:
            images, targets = self.mixup(images, labels)
        elif self.mixup is not None:  # a last batch of odd size is not mixed, only its labels are smoothed
            targets = mixup_target(labels, self.mixup.num_classes, 1.0, self.mixup.label_smoothing)
        statistics = [tensor.clone() for tensor in self._statistics]
        loss, logits = self._passes(images, targets)
        try:
            self.settle()  # meanwhile the device works on this step's passes
        except NonFiniteSteps:
            for tensor, old in zip(self._statistics, statistics):
                tensor.copy_(old)
            raise
        if self._averages:
            processes.average([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.before_update is not None:
            self.before_update()
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        # The norms stay on the device. The ranks have averaged their gradients before.
        norms = torch.stack(torch._foreach_norm(gradients))
        if self._sharded:  # each process has some rows of each gradient
            norms = processes.all_reduce_sum(norms.double().square()).sqrt().float()
        if self.clip_grad > 0:  # as torch.nn.utils.clip_grad_norm_ does
            share = self.clip_grad / (torch.linalg.vector_norm(norms) + 1e-6)
            torch._foreach_mul_(gradients, share.clamp(max=1.0))
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.skip = self.skips.decide(StepRecord(batch[0], loss, norms, f"{self.place}, learning rate {lr:.3g}"))
        for tensor, old in zip(self._statistics, statistics):
            tensor.copy_(torch.where(self.skip > 0, old, tensor))
        self._update()
        wanted = targets.argmax(dim=1) if targets.ndim == 2 else targets
        return loss, (logits.argmax(dim=1) == wanted).sum()

    def _update(self) -> None:
        """Run the optimizer's step unless it is skipped."""
        optimizer = self.optimizer
        fused = getattr(optimizer, "_step_supports_amp_scaling", False) and not self._sharded
        if isinstance(optimizer, RampingAdamW) or fused:
            optimizer.found_inf = self.skip  # as torch.amp.GradScaler tells them
            optimizer.step()
            del optimizer.found_inf
        elif not self.skip:
            optimizer.step()

    def settle(self, most: int = MOST_IN_A_ROW) -> None:
        """Read whether the step before was skipped, and count it if so.

        Every step calls this for the step before it. The caller calls it once more, after the last step.

        Raises NonFiniteSteps if `most` steps in a row were skipped.
        """
        last = self.skips.settle(most)
        if last is not None:
            model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
            with autocast(self.device):
                raise report(model, last, self.device)

    def _forward_and_backward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        parts = min(self.accumulate_steps, len(images))
        if parts == 1:
            loss, logits = self._forward(images, targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            return loss.detach(), logits
        losses, all_logits = [], []
        self.optimizer.zero_grad(set_to_none=True)
        with weights_quantized_once(self.model):
            for i, micro_batch in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts)), start=1):
                # The ranks average their gradients once, after the last micro-batch.
                alone = i < parts and isinstance(self.model, DistributedDataParallel)
                with self.model.no_sync() if alone else nullcontext():
                    loss, logits = self._forward(*micro_batch)
                    loss = loss * (len(logits) / len(images))
                    loss.backward()
                losses.append(loss.detach())
                all_logits.append(logits)
        return torch.stack(losses).sum(), torch.cat(all_logits)

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the class logits without a gradient."""
        with autocast(self.device):
            outputs = self.model(images)
            loss = self.criterion(images, outputs, targets)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return loss, logits.detach()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@dataclass
class EpochSums:
    """Sums over the epoch so far, on this process."""

    steps: int = 0
    images: int = 0
    totals: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Over the steps that were not skipped: number of images, sum of losses, number of correct predictions."""
    skipped_steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds for which the GPU waited for data."""
    lost_groups: int | Tensor = 0
    bad_images: int = 0
    extra: dict[str, float] = field(default_factory=dict)
    """Numbers for the log that are known before the first step."""

    def state_dict(self) -> dict:
        """All fields, tensors on the CPU. A field that an older state lacks has its default after `load_state_dict`."""
        state = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return state | {"lost_groups": int(self.lost_groups)}

    def load_state_dict(self, state: dict) -> None:
        self.__init__(**state)


def train_one_epoch(
    step: TrainStep,
    loader: DataLoader | Feed,
    epoch: int,
    num_epochs: int,
    after_step: Callable[[], None],
    sums: EpochSums | None = None,
) -> dict[str, float]:
    """Train on every batch of `loader`, calling `after_step` after each; returns the epoch's means over all ranks.

    `sums` already covers the batches of the epoch that come before the first one of `loader`. Each step is added to it
    before `after_step` is called. Skipped steps are counted but do not enter the means, which are NaN if all were
    skipped. Raises NonFiniteSteps after too many in a row.
    """
    step.model.train()
    lr = max(group["lr"] for group in step.optimizer.param_groups)
    sums = EpochSums() if sums is None else sums
    sums.totals = sums.totals.to(step.device)
    step.skips.count = sums.skipped_steps
    start = time.perf_counter() - sums.seconds
    feed = Feed.of(loader, step.device)
    with progress_bar(feed, f"epoch {epoch + 1}/{num_epochs}", sums.steps) as bar:
        for index, batch in enumerate(bar, start=sums.steps):
            step.place = f"epoch {epoch + 1}, step {index + 1}"
            loss, correct = step(batch)
            sums.steps += 1
            sums.images += len(batch[0])
            sums.seconds = time.perf_counter() - start
            sums.waited += feed.take_waited()
            numbers = torch.stack((torch.ones_like(loss), loss, correct)).double()
            numbers[:2] *= len(batch[0])
            sums.totals += torch.where(step.skip > 0, 0, numbers)
            after_step()
            if (index + 1) % CHECK_EVERY == 0 or index + 1 == len(loader):
                loss_mean, share = (sums.totals[1:3] / sums.totals[0]).tolist()
                seen = sums.images
                speed = seen * processes.world_size() / (time.perf_counter() - start)
                shown = f"loss {loss_mean:.4f}, acc {100 * share:.1f} %, {speed:.0f} img/s, lr {lr:.1e}"
                if step.device.type == "cuda":
                    shown += f", waited {100 * sums.waited / sums.seconds:.0f} % for data"
                bar.set_postfix_str(shown, refresh=False)
        step.settle()
    sums.waited += feed.take_waited()
    seconds = time.perf_counter() - start
    seen = sums.images * processes.world_size()  # samplers give every process the same number
    counted, loss_sum, correct_sum, *_ = processes.all_reduce_sum(sums.totals.clone())
    waited = {"waited_for_data": 100 * sums.waited / seconds} if step.device.type == "cuda" else {}
    return {
        "train_loss": float(loss_sum / counted),
        "train_acc1": float(100 * correct_sum / counted),
        "lr": lr,
        "img_per_s": seen / seconds,
        "skipped_steps": step.skips.count,
        **waited,
    }


def _sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=LEFT_OUT, reduction="sum")


def _percent_in_top(k: int, logits: Tensor, labels: Tensor) -> Tensor:
    # The best five are sought for every k, so that classes with equal logits have the same order for each of them.
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, :k]
    return 100 * (best == labels[:, None]).sum()


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": _sum_of_losses,
    "acc1": partial(_percent_in_top, 1),
    "acc5": partial(_percent_in_top, 5),
}
"""What an evaluation measures: functions of the logits [B, classes], fp32, and the labels [B] of a batch. Each returns
the sum over its images, without those labelled `LEFT_OUT`; the log has the mean over all images, `test_` before its
name."""


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader | Feed, device: torch.device) -> dict[str, float]:
    """The mean of each of `METRICS` over every image once, whatever the number of processes; accuracies in percent.

    Images labelled `LEFT_OUT` do not count.
    """
    model.eval()
    totals = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=device)  # images, then each metric
    # Sharded weights are gathered by all processes together, so those with fewer batches make extra forward passes.
    missing = max(processes.gather(len(loader))) - len(loader) if is_sharded_model(model) else 0
    with weights_quantized_once(model), progress_bar(Feed.of(loader, device), "evaluate") as bar:
        for images, labels in bar:
            with autocast(device):
                logits = model(images)
            sums = [measure(logits.float(), labels) for measure in METRICS.values()]
            totals += torch.stack([(labels != LEFT_OUT).sum().double(), *(value.double() for value in sums)])
        for _ in range(missing):
            with autocast(device):
                model(loader.dataset.dataset[0][0].unsqueeze(0).to(device))
    seen, *sums = processes.all_reduce_sum(totals).tolist()
    return {name: value / seen for name, value in zip(METRICS, sums)}


def progress_bar(loader: Feed | None, description: str, done: int = 0, total: int | None = None) -> tqdm:
    """A progress bar on the main process, over `loader` or over `total` steps, of which `done` are finished.

    If the output goes to a file, the bar prints a line every ten seconds.
    """
    options = {"leave": False, "dynamic_ncols": True, "disable": not processes.is_main()}
    bar = tqdm(loader, description, initial=done, total=total, **options)
    if not bar.disable and not bar.fp.isatty():
        bar.mininterval = 10
    return bar
