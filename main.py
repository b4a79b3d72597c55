"""Train or evaluate a Vision Transformer with its block linears in MXFP4: wiring, the epoch loop, exit codes."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import random
import sys
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import distributed
import oscillation_log
import sharding
import timm
from datasets import (
    CALIBRATION_ORDER,
    BadImages,
    DataConfig,
    Loaders,
    build_loaders,
    set_epoch,
    take_bad_images,
)
from determinism import deterministic
from divergence import MOST_IN_A_ROW, running_statistics
from engine import EpochSums, TrainStep, autocast, evaluate, train_one_epoch
from errors import NonFiniteSteps, RanksDiffer, Stopped, UserError
from fingerprint import fingerprint
from interrupts import Interrupts
from laboratory import Laboratory
from losses import DistillationLoss, base_criterion
from options import SAME_ON_RESUME, build_recipe, parse_args
from quantization import (
    OSCILLATION_THRESHOLD,
    RECIPES,
    Dampen,
    Freeze,
    Int4Linear,
    Int4Recipe,
    OsciReset,
    QEma,
    RampingAdamW,
    Recipe,
    detect_oscillation,
    has_fp8,
    initialise_steps,
    lerp_unless,
    quant_linears,
    set_matmul,
    take_lost_groups,
    update_periods,
)
from quantization.shards import local
from rank_check import RankCheck
from run_log import RunLog, say


def build_answer(args: argparse.Namespace, model: nn.Module, total_steps: int) -> Dampen | Freeze | OsciReset | None:
    """What else than Q-EMA and Q-Ramping the run does about oscillation."""
    if args.dampen is not None:
        return Dampen(model, total_steps, args.dampen, args.dampen_reduction)
    if args.freeze is not None:
        return Freeze(model, total_steps, args.freeze)
    if args.osci_reset:
        start, interval, threshold = args.osci_reset_start, args.osci_reset_interval, args.osci_reset_threshold
        return OsciReset(model, total_steps, start, interval, threshold)
    return None


def model_input_size(name: str, option: str = "--model") -> int:
    """The size that a timm model was made for. Raises UserError, with the nearest names, for an unknown model."""
    known = timm.is_model(name) and "." not in name
    config = timm.get_pretrained_cfg(name) if known else None  # an old name, such as xception, has none
    if config is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or ["deit_small_patch16_224"]
        raise UserError(f"{option} must be a model of timm, got {name!r}; did you mean {', '.join(near)}?")
    return config.input_size[-1]


def build_model(
    name: str, num_classes: int, input_size: int, drop_path: float, recipe: Recipe | Int4Recipe, option: str = "--model"
) -> nn.Module:
    """Raises UserError for a model that cannot be quantized or does not take the input size."""
    own_size = model_input_size(name, option)
    options = {"num_classes": num_classes, "drop_path_rate": drop_path}
    if input_size != own_size:
        options["img_size"] = input_size
    if recipe.quantizes:
        options["quant"] = recipe
    try:
        model = timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        if recipe.quantizes and "quant" in str(error):
            raise UserError(
                "--quant needs a Vision Transformer of timm with plain blocks (deit_*, vit_*) or a Swin Transformer "
                f"(swin_*), got --model {name}"
            ) from error
        raise UserError(
            f"{option} {name} cannot be built for --input-size {input_size}: {error}; its own is {own_size}"
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if input_size < patch[0] or input_size % patch[0]:
        raise UserError(f"--input-size must be a multiple of {name}'s patch size {patch[0]}, got {input_size}")
    return model


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Raises UserError for a model that cannot."""
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"--checkpoint-activations needs a model that timm can recompute, got --model {name}"
        ) from error


def build_optimizer(args: argparse.Namespace, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    no_decay = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, args.weight_decay, no_decay)
    options = {"lr": args.lr * args.batch_size * distributed.world_size() / 512, "betas": (0.9, 0.999), "eps": 1e-8}
    if args.q_ramping:
        return RampingAdamW(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=device.type == "cuda")


def build_criterion(args: argparse.Namespace, model: nn.Module, num_classes: int, device: torch.device) -> nn.Module:
    base = base_criterion(args.mixup + args.cutmix > 0, args.smoothing)
    if args.distillation_type == "none":
        return base
    if not hasattr(model, "set_distilled_training"):
        raise UserError(
            f"--distillation-type {args.distillation_type} needs a model with a distillation token "
            f"(deit_*_distilled_*), got --model {args.model}"
        )
    model.set_distilled_training(True)
    teacher = build_model(args.teacher_model, num_classes, args.input_size, 0.0, RECIPES["none"], "--teacher-model")
    checkpoint.load_weights(teacher, args.teacher_path, "--teacher-path", new_head=False)
    kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
    return DistillationLoss(base, teacher.to(device), kind, alpha, tau)


def open_output(args: argparse.Namespace) -> Path:
    """The run's directory, made if need be. Raises UserError if it cannot be written."""
    directory = args.output_dir
    if directory is None:
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
        directory = Path(distributed.from_main(f"runs/{stamp}-{args.model}-{args.quant}"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError as error:
        raise UserError(f"--output-dir must be a directory that can be written, got {directory} ({error})") from error
    if not writable:
        raise UserError(f"--output-dir must be writable, {directory} is not")
    return directory


def find_resume(args: argparse.Namespace) -> list[Path]:
    """The checkpoint to go on from, then those to take if it is damaged. Raises UserError if a run would be lost."""
    present = [] if args.output_dir is None else checkpoint.find_all(args.output_dir)
    if args.resume == "auto":
        return present
    if args.resume:
        return [Path(args.resume)]
    if present and not args.eval:
        raise UserError(f"{args.output_dir} holds a run; pass --resume auto to go on with it, or another --output-dir")
    return []


@dataclass
class QRamping:
    """Detects oscillation before an epoch and sets the optimizer's periods (paper Algorithm 2)."""

    model: nn.Module
    step: TrainStep
    loaders: Loaders
    data: DataConfig
    k1: float
    k2: int
    steps: int
    interrupts: Interrupts

    def before_epoch(self, epoch: int) -> dict[str, float]:
        """Raises Stopped, with everything as before, if a signal asks the run to end."""
        loader = self.loaders.calibration
        set_epoch(loader, self.data, CALIBRATION_ORDER + epoch)
        with tqdm(total=self.steps, desc="detect oscillation", leave=False, disable=not distributed.is_main()) as bar:

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
            ratios = detect_oscillation(self.model, self.step.optimizer, train_step, loader, self.steps)
            self.step.settle()
        periods = update_periods(ratios, self.k1, self.k2, max_period=len(self.loaders.train))
        self.step.optimizer.set_periods(periods)
        oscillating = sum((ratio > OSCILLATION_THRESHOLD).sum() for ratio in ratios.values())
        sums = torch.stack((oscillating.double(), sum(period.double().sum() for period in periods.values())))
        if sharding.is_sharded_model(self.model):
            distributed.all_reduce_sum(sums)
        total = sum(p.numel() for p in ratios)  # of all processes, also where each has a part
        oscillating, mean_period = (sums / total).tolist()
        return {"oscillating": 100 * oscillating, "mean_period": mean_period}


def run(args: argparse.Namespace) -> None:
    device = distributed.start(args.device)
    with deterministic(device) if args.deterministic else nullcontext():
        run_on(args, device)


def run_on(args: argparse.Namespace, device: torch.device) -> None:
    args.input_size = args.input_size or model_input_size(args.model)
    recipe = build_recipe(args)
    data = DataConfig(
        name=args.data_set,
        path=args.data_path,
        download=args.download,
        input_size=args.input_size,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        repeats=args.repeats,
        seed=args.seed,
        aa=args.aa,
        color_jitter=args.color_jitter,
        reprob=args.reprob,
        bad_images=BadImages(args.bad_images),
        keep_last_batch=args.keep_last_batch,
    )
    loaders = build_loaders(data)
    if args.num_classes not in (None, loaders.num_classes):
        raise UserError(
            f"--num-classes {args.num_classes} does not fit the data, which has {loaders.num_classes} classes"
        )

    seed = args.seed * distributed.world_size() + distributed.rank()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    model = build_model(args.model, loaders.num_classes, args.input_size, args.drop_path, recipe)
    if args.finetune:
        checkpoint.load_weights(model, args.finetune)
    if not args.fsdp:  # which takes the model to the device a part at a time
        model.to(device)
    set_matmul(model, args.matmul)
    if args.checkpoint_activations:
        checkpoint_activations(model, args.model)
    if args.compile:
        model.compile()  # in place, so that parameters keep their names
    identity = {
        "model": args.model,
        "number of classes": loaders.num_classes,
        "input size": args.input_size,
        "recipe": recipe.describe(),
    }
    if args.eval:
        evaluate_only(args, model, identity, loaders, device)
    else:
        train(args, model, identity, data, loaders, device)


def evaluate_only(
    args: argparse.Namespace, model: nn.Module, identity: dict, loaders: Loaders, device: torch.device
) -> None:
    """Print the held-out numbers as one JSON object; write nothing."""
    resume = find_resume(args)
    if resume:
        model.load_state_dict(checkpoint.load_newest(resume, identity)[1]["model"])
    elif not args.finetune:
        raise UserError(f"--eval --resume auto needs {args.output_dir / checkpoint.LAST}, which is missing")
    if args.fsdp:
        share_weights(model, device)
        sharding.shard(model, device)
    tested = evaluate(model, loaders.val, device)
    count_bad_images(loaders, set())
    say(json.dumps({f"test_{name}": value for name, value in tested.items()}))


def share_weights(model: nn.Module, device: torch.device) -> None:
    """All processes start from the main one's weights and buffers."""
    distributed.copy_from_main((*model.parameters(), *model.buffers()), device)


def train(
    args: argparse.Namespace,
    model: nn.Module,
    identity: dict,
    data: DataConfig,
    loaders: Loaders,
    device: torch.device,
) -> None:
    """Everything is checked before the output directory is made."""
    resume = find_resume(args)
    identity["optimizer"] = "RampingAdamW" if args.q_ramping else "AdamW"
    identity |= {f"--{name.replace('_', '-')}": getattr(args, name) for name in SAME_ON_RESUME}
    if distributed.is_main():  # both data sets are wrapped: by the order of their batches, by the processes' shares
        halves = (fingerprint(loader.dataset.dataset) for loader in (loaders.train, loaders.val))
        identity["data"] = " + ".join(halves)
    identity = distributed.from_main(identity)
    resumed, state = checkpoint.load_newest(resume, identity) if resume else (None, None)
    criterion = build_criterion(args, model, loaders.num_classes, device)
    if args.quant == "int4" and state is None:
        set_epoch(loaders.calibration, data, CALIBRATION_ORDER)
        with autocast(device):
            initialise_steps(model, next(iter(loaders.calibration))[0].to(device))
    num_parameters = sum(p.numel() for p in model.parameters())
    if distributed.world_size() > 1 and running_statistics(model):
        raise UserError(
            f"--model {args.model} has batch norms, whose statistics would differ between processes; train it by one"
        )
    share_weights(model, device)
    q_ema = QEma(model) if args.q_ema else None
    model_ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema_decay else None
    parallel = model
    if args.fsdp:
        for whole in (model,) if model_ema is None else (model, model_ema.module):
            sharding.shard(whole, device)
    elif distributed.world_size() > 1:
        parallel = distributed.data_parallel(model, device)
    optimizer = build_optimizer(args, model, device)
    scheduler = CosineLRScheduler(
        optimizer, args.epochs, args.min_lr, warmup_t=args.warmup_epochs, warmup_lr_init=args.warmup_lr
    )
    mixup = None
    if args.mixup + args.cutmix > 0:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=loaders.num_classes)
    answer = build_answer(args, model, args.epochs * len(loaders.train))
    before_update = answer.add_gradients if isinstance(answer, Dampen) else None
    step = TrainStep(
        parallel,
        criterion,
        optimizer,
        device,
        mixup=mixup,
        before_update=before_update,
        clip_grad=args.clip_grad,
        cuda_graph=args.cuda_graph,
        accumulate_steps=args.accumulate_steps,
    )
    interrupts = Interrupts(device)
    ramping = None
    if args.q_ramping:
        k1, k2, steps = args.q_ramping_k1, args.q_ramping_k2, args.q_ramping_steps
        ramping = QRamping(model, step, loaders, data, k1, k2, steps, interrupts)
    laboratory = Laboratory(model, loaders.val.dataset, device) if args.track_oscillation else None
    if not distributed.is_main():
        laboratory = None  # the weights are the same everywhere
    more = {"skips": step.skips} | ({} if answer is None else {"oscillation": answer})
    within = {} if laboratory is None else {"laboratory": laboratory}
    progress = checkpoint.Run(
        identity, model, optimizer, scheduler, model_ema, more=more, within=within, keep=args.keep_checkpoints
    )
    if state is not None:
        progress.restore(state)
        if progress.epoch == args.epochs:
            say(f"{resumed} has all its {args.epochs} epochs done; best top-1 {progress.best_acc1:.2f} %")
            return

    check = None
    if args.check_ranks is not None:
        check = RankCheck(
            model, optimizer, args.check_ranks, step=progress.epoch * len(loaders.train) + progress.sums.steps
        )

    tallies: deque[tuple[int, int | Tensor]] = deque(maxlen=MOST_IN_A_ROW + 1)
    """Bad images and lost groups of the epoch so far, after each of the last steps."""

    def after_step() -> None:
        """Only the laboratory takes part in a skipped step, in which nothing moves."""
        sums = progress.sums
        sums.bad_images += take_bad_images(loaders.train)[0]
        sums.lost_groups = sums.lost_groups + take_lost_groups(device)
        tallies.append((sums.bad_images, sums.lost_groups))
        if q_ema is not None:
            q_ema.update(step.skip)
        if answer is not None:
            answer.update(step.skip)
        if model_ema is not None:
            update_average(model_ema, model, step.skip)
        if laboratory is not None:
            laboratory.after_step()
        if check is not None:
            check.after_step()
        done = sums.steps
        if done == num_steps and progress.epoch + 1 == args.epochs:  # too few may be left for ten in a row
            step.settle(min(num_steps, MOST_IN_A_ROW))
        if interrupts.agreed(None if done == num_steps else done):
            stop()
        due = args.save_steps and (progress.epoch * num_steps + done) % args.save_steps == 0
        if due and not (done == num_steps and saves_epoch(progress.epoch)):
            save()

    saved = None

    def save(best: bool = False) -> None:
        nonlocal saved
        step.settle()
        progress.sums.skipped_steps = step.skips.count if progress.sums.steps else 0  # they are an epoch's
        progress.save(directory, best)
        saved = progress.epoch, progress.sums.steps

    def saves_epoch(epoch: int) -> bool:
        return (epoch + 1) % args.save_epochs == 0 or epoch + 1 == args.epochs

    def stop() -> None:
        if saved != (progress.epoch, progress.sums.steps):
            save()
        distributed.gather(None)  # torchrun ends all processes when the first one has ended
        done = f"{progress.epoch} epochs and {progress.sums.steps} steps"
        name = "a signal to another process" if interrupts.received is None else interrupts.received.name
        raise Stopped(f"{name} after {done}; --resume auto --output-dir {directory} goes on from there")

    num_steps = len(loaders.train)
    directory = open_output(args)
    if laboratory is not None:
        oscillation_log.start(directory / oscillation_log.FILE_NAME, progress.epoch)
    describe(args, model, identity["recipe"], loaders, device, directory, num_parameters)
    if state is not None:
        steps_done = f" and {progress.sums.steps} of {num_steps} steps" if progress.sums.steps else ""
        say(f"resume  {resumed}, {progress.epoch} of {args.epochs} epochs{steps_done} done")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings |= {"torch": torch.__version__, "timm": timm.__version__}
    with RunLog(directory, settings, progress.epoch) as log, interrupts:
        say(TABLE_HEAD)
        named: set[str] = set()
        for epoch in range(progress.epoch, args.epochs):
            sums = progress.sums
            tallies.clear()
            tallies.append((sums.bad_images, sums.lost_groups))
            # The first detection comes after T_update = one epoch of steps.
            try:
                if ramping and epoch > 0 and sums.steps == 0:
                    try:
                        sums.extra = ramping.before_epoch(epoch)
                    except Stopped:
                        stop()
                set_epoch(loaders.train, data, epoch, sums.steps)
                if laboratory is not None:
                    laboratory.before_epoch(num_steps - sums.steps)
                numbers = {"epoch": epoch}
                numbers |= train_one_epoch(step, loaders.train, epoch, args.epochs, after_step, sums)
            except NonFiniteSteps:
                # Nothing has changed since the last good step, so the run goes on, or fails again, from there.
                sums.steps = max(0, sums.steps - MOST_IN_A_ROW)
                sums.images = sums.steps * args.batch_size
                step.skips.count = max(0, step.skips.count - MOST_IN_A_ROW)
                sums.bad_images, sums.lost_groups = tallies[0]
                progress.within = {}  # which saw the bad steps as steps
                save()
                raise
            scheduler.step(epoch + 1)
            if laboratory is not None:
                log.oscillation(laboratory.after_epoch(epoch, (epoch + 1) * num_steps))
            tested = evaluate(model, loaders.val, device)
            numbers["bad_images"] = count_bad_images(loaders, named, sums.bad_images)
            numbers |= {f"test_{name}": value for name, value in tested.items()}
            if model_ema is not None:
                averaged = evaluate(model_ema.module, loaders.val, device)
                take_bad_images(loaders.val)  # counted above
                numbers |= {f"ema_{name}": value for name, value in averaged.items()}
            lost_groups = int(distributed.all_reduce_sum(take_lost_groups(device) + sums.lost_groups).item())
            numbers |= {"n_parameters": num_parameters, "lost_groups": lost_groups, **sums.extra}
            numbers |= {} if answer is None else answer.numbers()
            is_best = tested["acc1"] > progress.best_acc1
            progress.epoch, progress.best_acc1 = epoch + 1, max(progress.best_acc1, tested["acc1"])
            progress.sums = EpochSums()
            log.epoch(numbers)  # before the checkpoint: what is logged and not saved is dropped and logged again
            if saves_epoch(epoch):
                save(is_best)
            elif is_best:
                progress.save_best(directory)
            say(table_row(numbers, args.epochs))
            if epoch + 1 < args.epochs and interrupts.agreed():
                stop()
    say(f"best top-1 {progress.best_acc1:.2f} %; checkpoints and logs in {directory}")


def count_bad_images(loaders: Loaders, named: set[str], before: int = 0) -> int:
    """Images of all processes that could not be read since the last call; says which, but for those in `named`.

    `before` is how many more this process has counted.
    """
    counted = [take_bad_images(loader) for loader in (loaders.train, loaders.val)]
    total = before + sum(count for count, _ in counted)
    gathered = distributed.gather((total, set().union(*(paths for _, paths in counted))))
    for path in sorted(set().union(*(paths for _, paths in gathered)) - named):
        say(f"note    {path} is not a readable image and was left out")
        named.add(path)
    return sum(count for count, _ in gathered)


def update_average(model_ema: ModelEmaV3, model: nn.Module, skip: Tensor) -> None:
    """`model_ema.update(model)`, bit for bit, except that nothing changes where `skip` is 1."""
    averages, values = model_ema.module.state_dict(), model.state_dict()
    floats = [name for name, average in averages.items() if average.is_floating_point()]
    means, targets = ([local(state[name]) for name in floats] for state in (averages, values))
    lerp_unless(skip, means, targets, 1 - model_ema.decay)
    for name in averages.keys() - floats:
        averages[name].copy_(torch.where(skip > 0, averages[name], values[name]))


def describe(
    args: argparse.Namespace,
    model: nn.Module,
    recipe: str,
    loaders: Loaders,
    device: torch.device,
    directory: Path,
    num_parameters: int,
) -> None:
    """What is about to run, in a few lines."""
    held_out = sum(distributed.gather(len(loaders.val.dataset)))
    num_linears = len(quant_linears(model)) + sum(isinstance(module, Int4Linear) for module in model.modules())
    say(f"model   {args.model}: {num_parameters:,} parameters, {num_linears} linears in {args.quant}")
    fp8 = device.type == "cuda" and args.quant != "int4" and args.matmul != "bf16" and has_fp8(device)
    arithmetic = ("fp8" if fp8 else "bf16") if device.type == "cuda" else "fp32"
    how = "simulated" if args.quant == "int4" else "multiplied"
    say(f"recipe  {recipe}" + (f", {how} in {arithmetic}" if args.quant != "none" else ""))
    if args.compile and device.type == "cpu":
        say("note    --compile is for GPUs; on a CPU it gains nothing")
    if args.q_ema and args.q_ramping:
        say("note    the paper does not study Q-EMA and Q-Ramping together (C.4); detection measures plain rounding")
    say(
        f"data    {args.data_set}: {len(loaders.train.dataset):,} training and {held_out:,} held-out images "
        f"of {args.input_size} px, {loaders.num_classes} classes"
    )
    how = ", weights sharded" if args.fsdp else ""
    say(f"run     {directory} on {distributed.world_size()} x {device.type}, batch {args.batch_size} each{how}")


TABLE_HEAD = f"{'epoch':>8} {'train loss':>11} {'test loss':>10} {'top-1 %':>8} {'top-5 %':>8} {'img/s':>8} {'lr':>8}"


def table_row(numbers: dict[str, float], epochs: int) -> str:
    row = f"{numbers['epoch'] + 1:>{8 - len(str(epochs)) - 1}}/{epochs} {numbers['train_loss']:>11.4f} "
    row += f"{numbers['test_loss']:>10.4f} {numbers['test_acc1']:>8.2f} {numbers['test_acc5']:>8.2f} "
    row += f"{numbers['img_per_s']:>8.0f} {numbers['lr']:>8.1e}"
    if "ema_acc1" in numbers:
        row += f"   average: {numbers['ema_acc1']:.2f} %"
    if "oscillating" in numbers:
        row += f"   {numbers['oscillating']:.2f} % oscillate, mean period {numbers['mean_period']:.2f}"
    if numbers["lost_groups"]:
        row += f"   {numbers['lost_groups']:,} groups out of FP8's range became zero"
    if numbers["bad_images"]:
        row += f"   {numbers['bad_images']:,} images were not readable"
    if numbers["skipped_steps"]:
        row += f"   {numbers['skipped_steps']:,} steps were not finite and skipped"
    return row


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 diverged, 2 the user must change something, 75 stopped by a signal, 130 interrupted.

    Of several processes, each that fails says why, and the same message is said once.
    """
    code = 0
    logging.getLogger("timm").setLevel(logging.ERROR)  # its schedule warns of runs of one epoch
    try:
        run(parse_args(argv))
    except UserError as error:
        # From a loader's process the text comes with its traceback in front.
        message, code = f"main.py: error: {str(error).rpartition('UserError: ')[2]}", 2
    except OSError as error:  # no space, no permission, a name too long
        message, code = f"main.py: error: {error}", 2
    except NonFiniteSteps as error:
        message, code = f"main.py: diverged: {error}", 1
    except RanksDiffer as error:
        message, code = f"main.py: ranks differ: {error}", 1
    except Stopped as error:
        message, code = f"main.py: stopped by {error}", os.EX_TEMPFAIL
    except KeyboardInterrupt:
        message, code = "main.py: interrupted; --resume auto goes on from the last checkpoint", 130
    except Exception as error:
        # A collective breaks off where another process has ended; that one says why.
        broken_off = isinstance(error, RuntimeError) and distributed.another_has_failed()
        if broken_off or not distributed.first_to_report(repr(error)):
            return 1
        raise
    if code and distributed.first_to_report(message):
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    if code in (0, 1, os.EX_TEMPFAIL):  # where all processes end; after another failure it would wait for the rest
        distributed.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
