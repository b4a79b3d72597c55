"""One training step, one epoch, one evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from cuda_graph import CudaGraph
from errors import NonFiniteLoss
from losses import DistillationLoss
from quantization import quant_linears, weights_quantized_once
from sharding import is_sharded_model

CHECK_EVERY = 10  # steps between two looks at the loss; on a GPU each look waits for the device
Batch = tuple[Tensor, Tensor]


@dataclass
class TrainStep:
    """Forward, backward and optimizer step on one batch; Q-Ramping's detection takes the very same step."""

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    mixup: Mixup | None = None
    before_update: Callable[[], None] | None = None
    """Called after the backward pass, before gradients are clipped and used."""
    clip_grad: float = 0.0
    """Gradients whose norm, over all parameters together, is larger are scaled down to it; 0 leaves them alone.

    A norm that is not finite leaves no finite gradient but 0, so that `RampingAdamW` lets such a step pass.
    """
    cuda_graph: bool = False
    """Replay forward and backward pass as one CUDA graph: for one process on a GPU."""

    def __post_init__(self) -> None:
        self._passes = self._forward_and_backward
        if self.cuda_graph:
            tensors = [*self.model.parameters(), *self.model.buffers()]
            layers = list(quant_linears(self.model).values())

            def state() -> tuple:
                modes = self.model.training, *(layer.use_q_ema for layer in layers)
                return *modes, *(tensor.data_ptr() for tensor in tensors)

            self._passes = CudaGraph(self._forward_and_backward, self.model.parameters(), state)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the loss and the number of right answers, as tensors on the device."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        loss, logits = self._passes(images, targets)
        if self.before_update is not None:
            self.before_update()
        if self.clip_grad > 0:  # on the device alone, and after the ranks have averaged their gradients
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        wanted = targets.argmax(dim=1) if targets.ndim == 2 else targets
        return loss, (logits.argmax(dim=1) == wanted).sum()

    def _forward_and_backward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.device):
            outputs = self.model(images)
            if isinstance(self.criterion, DistillationLoss):
                loss = self.criterion(images, outputs, targets)
            else:
                loss = self.criterion(outputs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return loss.detach(), logits.detach()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train_one_epoch(
    step: TrainStep,
    loader: DataLoader,
    epoch: int,
    num_epochs: int,
    after_step: Callable[[], None],
) -> dict[str, float]:
    """Train on every batch of `loader`, calling `after_step` after each; returns the epoch's means over all ranks.

    Raises NonFiniteLoss, naming epoch, step and learning rate, within `CHECK_EVERY` steps of such a loss.
    """
    step.model.train()
    lr = max(group["lr"] for group in step.optimizer.param_groups)
    totals = torch.zeros(2, device=step.device, dtype=torch.float64)  # loss, right answers
    seen = 0
    first_bad = torch.full((), len(loader), device=step.device)
    start = time.perf_counter()
    with progress(loader, f"epoch {epoch + 1}/{num_epochs}") as bar:
        for index, batch in enumerate(bar):
            loss, correct = step(batch)
            after_step()
            seen += len(batch[0])
            totals += torch.stack((loss.double() * len(batch[0]), correct.double()))
            first_bad = torch.where(loss.isfinite(), first_bad, first_bad.clamp(max=index))
            if (index + 1) % CHECK_EVERY == 0 or index + 1 == len(loader):
                loss_sum, correct_sum, bad = torch.cat((totals, first_bad.double().view(1))).tolist()
                if bad < len(loader):
                    raise NonFiniteLoss(
                        f"the loss is not finite at epoch {epoch + 1}, step {int(bad) + 1}, learning rate {lr:.3g}; "
                        "lower --lr, lengthen --warmup-epochs, or look at the data"
                    )
                speed = seen * distributed.world_size() / (time.perf_counter() - start)
                bar.set_postfix_str(
                    f"loss {loss_sum / seen:.4f}, acc {100 * correct_sum / seen:.1f} %, {speed:.0f} img/s, lr {lr:.1e}"
                )
    seconds = time.perf_counter() - start
    seen *= distributed.world_size()  # drop_last: every process sees as many
    loss_sum, correct_sum = distributed.all_reduce_sum(totals).tolist()
    return {
        "train_loss": loss_sum / seen,
        "train_acc1": 100 * correct_sum / seen,
        "lr": lr,
        "img_per_s": seen / seconds,
    }


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Loss and top-1 and top-5 accuracy in percent over every image once, whatever the number of processes."""
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # images, loss, top-1, top-5
    totals[0] = len(loader.dataset)
    # Where all processes gather the weights together, those with fewer batches must go through the model as often.
    missing = max(distributed.gather(len(loader))) - len(loader) if is_sharded_model(model) else 0
    with weights_quantized_once(model), progress(loader, "evaluate") as bar:
        for batch in bar:
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            with autocast(device):
                logits = model(images)
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals[1:] += torch.stack((loss, best[:, 0].sum(), best.sum())).double()
        for _ in range(missing):
            with autocast(device):
                model(loader.dataset.dataset[0][0].unsqueeze(0).to(device))
    seen, loss, top1, top5 = distributed.all_reduce_sum(totals).tolist()
    return {"loss": loss / seen, "acc1": 100 * top1 / seen, "acc5": 100 * top5 / seen}


def progress(loader: DataLoader, description: str) -> tqdm:
    """A progress bar on the main process; into a file it writes one line in ten seconds."""
    bar = tqdm(loader, description, leave=False, dynamic_ncols=True, disable=not distributed.is_main())
    if not bar.disable and not bar.fp.isatty():
        bar.mininterval = 10
    return bar
