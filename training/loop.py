"""The loop over a run's epochs: what happens after each step and each epoch, and how a run stops early."""

from __future__ import annotations

import math
import signal
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from datasets import CALIBRATION_ORDER, DataConfig, Loaders, set_epoch, take_bad_images
from engine import EpochSums, TrainStep, evaluate, progress_bar, train_one_epoch
from quantization import Remedies, copy_precision, detect_oscillation, lerp_unless, take_lost_groups
from quantization.shards import local
from runtime import processes, sharding
from runtime.errors import NonFiniteSteps, Stopped
from runtime.interrupts import Interrupts
from runtime.nonfinite import MOST_IN_A_ROW
from runtime.rank_check import RankCheck
from tracking.tracker import OscillationTracker
from training import checkpoint
from training.run_log import TABLE_HEAD, RunLog, table_row


@dataclass
class RunForRemedies:
    """What the remedies may use of a training run (`TrainingRun` of quantization/remedies/base.py)."""

    model: nn.Module
    step: TrainStep
    loaders: Loaders
    data: DataConfig
    interrupts: Interrupts

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.step.optimizer

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loaders.train)

    def measure_ratios(self, epoch: int, steps: int) -> dict[nn.Parameter, Tensor]:
        """Raises Stopped, with everything restored, if a signal asks the run to end."""
        loader = self.loaders.calibration
        set_epoch(loader, self.data, CALIBRATION_ORDER + epoch)
        with progress_bar(None, "detect oscillation", total=steps) as bar:

            def train_step(batch) -> None:
                nonlocal done
                self.step(batch)
                bar.update()
                done += 1
                if self.interrupts.agreed(done):
                    raise Stopped

            done = 0

            self.step.place = f"the detection before epoch {epoch + 1}"
            self.model.train()
            ratios = detect_oscillation(self.model, self.step.optimizer, train_step, loader, steps)
            self.step.settle()
        return ratios

    def sum_over_shards(self, sums: Tensor) -> Tensor:
        return processes.all_reduce_sum(sums) if sharding.is_sharded_model(self.model) else sums


@dataclass
class Training:
    """A run of `epochs` epochs that goes on from `progress`."""

    progress: checkpoint.RunState
    step: TrainStep
    loaders: Loaders
    data: DataConfig
    interrupts: Interrupts
    directory: Path
    """Directory of the checkpoints."""
    epochs: int
    save_epochs: int
    """Epochs between two checkpoints."""
    save_steps: int
    """Steps between additional checkpoints within an epoch; 0 for none."""
    num_parameters: int
    """Number of parameters of the whole model, for the log."""
    remedies: Remedies = field(default_factory=Remedies)
    tracker: OscillationTracker | None = None
    check: RankCheck | None = None
    _tallies: deque[tuple[int, int | Tensor]] = field(default_factory=lambda: deque(maxlen=MOST_IN_A_ROW + 1))
    """Bad images and lost groups of the epoch so far, after each of the last steps."""
    _named: set[str] = field(default_factory=set)
    """Paths of the bad images that were already reported."""
    _saved: tuple[int, int] | None = None
    """Epoch and step of the last checkpoint."""

    def run(self, log: RunLog) -> None:
        """Train the remaining epochs.

        Raises Stopped after a signal, and KeyboardInterrupt after ctrl-C, with a checkpoint written. Raises
        NonFiniteSteps if training diverges. If steps were skipped, the last checkpoint holds the state before them. If
        only the last held-out loss is not finite, no checkpoint is written.
        """
        processes.say(TABLE_HEAD)
        for epoch in range(self.progress.epoch, self.epochs):
            numbers = self._train(epoch)
            self.progress.scheduler.step(epoch + 1)
            if self.tracker is not None:
                log.oscillation(self.tracker.after_epoch(epoch, (epoch + 1) * len(self.loaders.train)))
            numbers |= self._evaluate()
            finite = math.isfinite(numbers["test_loss"])
            if epoch + 1 == self.epochs and not finite:  # a run that ends so leaves no final checkpoint
                processes.say(table_row(numbers, self.epochs))
                raise NonFiniteSteps(
                    f"the held-out loss after the last epoch is {numbers['test_loss']}; lower --lr or warm up longer"
                )
            is_best = numbers["test_acc1"] > self.progress.best_acc1 and finite
            self.progress.epoch += 1
            if is_best:
                self.progress.best_acc1 = numbers["test_acc1"]
            self.progress.sums = EpochSums()
            # The log comes before the checkpoint: an epoch that is logged but not saved is repeated and logged again.
            log.epoch(numbers)
            if self._saves_epoch(epoch):
                self._save(is_best)
            elif is_best:
                self.progress.save_best(self.directory)
            processes.say(table_row(numbers, self.epochs))
            if epoch + 1 < self.epochs and self.interrupts.agreed():
                self._stop()

    def _train(self, epoch: int) -> dict[str, float]:
        """The remaining steps of the epoch, after the detection that precedes its first step."""
        sums = self.progress.sums
        self._tallies.clear()
        self._tallies.append((sums.bad_images, sums.lost_groups))
        try:
            if sums.steps == 0:
                try:
                    sums.extra = self.remedies.before_epoch(epoch)
                except Stopped:
                    self._stop()
            set_epoch(self.loaders.train, self.data, epoch, sums.steps)
            if self.tracker is not None:
                self.tracker.before_epoch(len(self.loaders.train) - sums.steps)
            numbers = train_one_epoch(self.step, self.loaders.train, epoch, self.epochs, self._after_step, sums)
            return {"epoch": epoch} | numbers
        except NonFiniteSteps:
            # Nothing has changed since the last good step, so a resumed run goes on, or fails again, from there.
            sums.steps = max(0, sums.steps - MOST_IN_A_ROW)
            sums.images = sums.steps * self.data.batch_size
            self.step.skips.count = max(0, self.step.skips.count - MOST_IN_A_ROW)
            sums.bad_images, sums.lost_groups = self._tallies[0]
            self.progress.within = {}  # its objects recorded the skipped steps
            self._save()
            raise

    def _after_step(self) -> None:
        """All that follows an optimizer step. It also follows a skipped one, but then changes no weight or average."""
        sums, skip = self.progress.sums, self.step.skip
        sums.bad_images += take_bad_images(self.loaders.train)[0]
        sums.lost_groups = sums.lost_groups + take_lost_groups(self.step.device)
        self._tallies.append((sums.bad_images, sums.lost_groups))
        self.remedies.after_step(skip)
        if self.progress.model_ema is not None:
            update_average(self.progress.model_ema, self.progress.model, skip)
        if self.tracker is not None:
            self.tracker.after_step()
        if self.check is not None:
            self.check.after_step()
        epoch, done, num_steps = self.progress.epoch, sums.steps, len(self.loaders.train)
        if done == num_steps and epoch + 1 == self.epochs:  # an epoch may have fewer steps than ten
            self.step.settle(min(num_steps, MOST_IN_A_ROW))
        if self.interrupts.agreed(None if done == num_steps else done):
            self._stop()
        due = self.save_steps and (epoch * num_steps + done) % self.save_steps == 0
        if due and not (done == num_steps and self._saves_epoch(epoch)):
            self._save()

    def _evaluate(self) -> dict[str, float]:
        """The numbers of an epoch's log line that training itself does not give."""
        sums, device = self.progress.sums, self.step.device
        tested = evaluate(self.progress.model, self.loaders.val, device)
        numbers = {"bad_images": count_bad_images(self.loaders, self._named, sums.bad_images)}
        numbers |= {f"test_{name}": value for name, value in tested.items()}
        if self.progress.model_ema is not None:
            copy_precision(self.progress.model, self.progress.model_ema.module)
            averaged = evaluate(self.progress.model_ema.module, self.loaders.val, device)
            numbers |= {f"ema_{name}": value for name, value in averaged.items()}
        numbers |= evaluate_views(self.remedies, self.progress.model, self.loaders, device)
        take_bad_images(self.loaders.val)  # they were counted above
        lost_groups = int(processes.all_reduce_sum(take_lost_groups(device) + sums.lost_groups).item())
        numbers |= {"n_parameters": self.num_parameters, "lost_groups": lost_groups, **sums.extra}
        return numbers | self.remedies.log_numbers()

    def _saves_epoch(self, epoch: int) -> bool:
        return (epoch + 1) % self.save_epochs == 0 or epoch + 1 == self.epochs

    def _save(self, best: bool = False) -> None:
        sums = self.progress.sums
        self.step.settle()
        sums.skipped_steps = self.step.skips.count if sums.steps else 0  # the count belongs to the epoch
        self.progress.save(self.directory, best)
        self._saved = self.progress.epoch, sums.steps

    def _stop(self) -> None:
        epoch, steps = self.progress.epoch, self.progress.sums.steps
        if self._saved != (epoch, steps):
            self._save()
        processes.gather(None)  # wait: torchrun ends all processes when the first one has ended
        received = self.interrupts.received
        name = "a signal to another process" if received is None else received.name
        done = f"{epoch} epochs and {steps} steps"
        if received is signal.SIGINT:
            raise KeyboardInterrupt(f"after {done}")
        raise Stopped(f"{name} after {done}; --resume auto --output-dir {self.directory} goes on from there")


def evaluate_views(remedies: Remedies, model: nn.Module, loaders: Loaders, device: torch.device) -> dict[str, float]:
    """The held-out numbers of the model as the remedies see it, besides as it is: `quantized_acc1` of a healed one."""
    numbers = {}
    for prefix, context in remedies.views().items():
        with context:
            numbers |= {f"{prefix}_{name}": value for name, value in evaluate(model, loaders.val, device).items()}
    return numbers


def count_bad_images(loaders: Loaders, named: set[str], before: int = 0) -> int:
    """Number of images, over all processes, that could not be read since the last call. Reports those not in `named`.

    `before` is added to this process's count.
    """
    counted = [take_bad_images(loader) for loader in (loaders.train, loaders.val) if loader is not None]
    total = before + sum(count for count, _ in counted)
    gathered = processes.gather((total, set().union(*(paths for _, paths in counted))))
    for path in sorted(set().union(*(paths for _, paths in gathered)) - named):
        processes.say(f"note    {path} is not a readable image and was left out")
        named.add(path)
    return sum(count for count, _ in gathered)


def update_average(model_ema: ModelEmaV3, model: nn.Module, skip: Tensor) -> None:
    """`model_ema.update(model)` by the formula of `lerp_unless`, except that nothing changes where `skip` is 1."""
    averages, values = model_ema.module.state_dict(), model.state_dict()
    floats = [name for name, average in averages.items() if average.is_floating_point()]
    means, targets = ([local(state[name]) for name in floats] for state in (averages, values))
    lerp_unless(skip, means, targets, 1 - model_ema.decay)
    for name in averages.keys() - floats:
        averages[name].copy_(torch.where(skip > 0, averages[name], values[name]))
