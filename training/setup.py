"""Builds everything that the options ask for, then trains or evaluates."""

from __future__ import annotations

import math
import random
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

import timm
from datasets import (
    CALIBRATION_ORDER,
    DATA_SETS,
    AugmentOn,
    BadImages,
    DataConfig,
    Loaders,
    Preprocessing,
    build_loaders,
    fingerprint,
    set_epoch,
)
from engine import EpochSums, TrainStep, autocast, evaluate
from quantization import (
    RECIPES,
    REMEDIES,
    Coverage,
    Int4Recipe,
    Recipe,
    Remedies,
    RunLength,
    Status,
    initialise_steps,
    set_matmul,
    uses_fp8,
)
from quantization.formats import GROUP_SIZE
from quantization.recipe import changed_recipe
from runtime import processes, sharding
from runtime.environment import environment
from runtime.errors import NonFiniteSteps, UserError
from runtime.files import exclusive
from runtime.interrupts import Interrupts
from runtime.nonfinite import running_statistics
from runtime.processes import say
from runtime.rank_check import RankCheck
from tracking import oscillation_csv
from tracking.tracker import OscillationTracker
from training import checkpoint
from training.loop import RunForRemedies, Training, count_bad_images, evaluate_views
from training.losses import Criterion, DistillationLoss, Renormalization, base_criterion
from training.models import (
    build_model,
    check_coverage,
    checkpoint_activations,
    model_input_size,
    preprocessing_of,
    share_weights,
)
from training.optimizer import build_optimizer, build_scheduler
from training.options import FIELDS, SAME_ON_RESUME, LowPrecisionOptions, Options, flag
from training.report import COMMAND, ENVIRONMENT
from training.run_log import RunLog, json_line
from training.weights import Weights, fit_weights, load_weights, read_weights

OPTIMIZER, DATA, CLASSES = "optimizer", "data", "classes"
"""Keys of the identity that are no options."""


def implied_identity(classes: tuple[str, ...] | None = None) -> dict[str, object]:
    """The values that an older checkpoint had of the settings which did not exist when it was written.

    An option had its default, or None if it needs another option that is off by default. All images were augmented on
    the CPU and normalized by ImageNet's numbers, and all groups had 32 values. The classes' names were not stored;
    `classes` stands for them.
    """
    implied = {OPTIMIZER: "AdamW", CLASSES: classes, "mean": Preprocessing().mean, "std": Preprocessing().std}
    implied["group size"] = 32
    for name in SAME_ON_RESUME:
        f = FIELDS[name]
        implied[flag(name)] = None if f.metadata.get("needs") and "None" in f.type else f.default
    return implied | {flag("augment_on"): AugmentOn.CPU.value}


@dataclass(frozen=True)
class Setup:
    """The parts that training and evaluation both need."""

    options: Options
    device: torch.device
    data: DataConfig
    loaders: Loaders
    model: nn.Module
    remedies: Remedies
    identity: dict[str, object]
    """The settings that a checkpoint must share with this model."""
    coverage: Coverage | None
    """What of the model is quantized; None if the recipe quantizes nothing."""


def build_recipe(precision: LowPrecisionOptions) -> Recipe | Int4Recipe:
    """The named recipe with the changes that the options ask for."""
    return changed_recipe(
        precision.quant,
        quantizers=precision.quantizers,
        backward_rounding=precision.backward_rounding,
        backward_operands=precision.backward_operands,
        scaling=precision.scaling,
        forward_element=precision.forward_element,
        backward_element=precision.backward_element,
    )


def build_remedies(options: Options, loaders: Loaders) -> Remedies:
    """The remedies that the options ask for. Raises UserError for options that do not fit the run."""
    steps_per_epoch = 0 if loaders.train is None else len(loaders.train)
    with users_mistakes():
        return Remedies.from_options(options.remedies, RunLength(options.training.epochs, steps_per_epoch))


@contextmanager
def users_mistakes() -> Iterator[None]:
    """A ValueError of a remedy about its options becomes a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def preprocessing(options: Options) -> Preprocessing:
    """The model's own for image folders, the default for other data sets, with the mean and std of the user."""
    in_files = DATA_SETS[options.data.data_set].one_file_per_image
    own = preprocessing_of(options.model.model) if in_files else Preprocessing()
    given = {name: tuple(value) for name in ("mean", "std") if (value := getattr(options.data, name)) is not None}
    return replace(own, **given)


def data_config(options: Options, input_size: int) -> DataConfig:
    data = options.data
    return DataConfig(
        name=data.data_set,
        path=data.data_path,
        download=data.download,
        input_size=input_size,
        batch_size=options.training.batch_size,
        num_workers=data.num_workers,
        repeats=data.repeats,
        seed=options.training.seed,
        aa=data.aa,
        color_jitter=data.color_jitter,
        reprob=data.reprob,
        bad_images=BadImages(data.bad_images),
        keep_last_batch=data.keep_last_batch,
        preprocessing=preprocessing(options),
        exif_orientation=data.exif_orientation,
        held_out_only=options.run.eval,
        augment_on=AugmentOn(data.augment_on),
    )


def seed_generators(seed: int) -> None:
    """Every process draws random numbers of its own."""
    own = seed * processes.world_size() + processes.rank()
    torch.manual_seed(own)
    np.random.seed(own % 2**32)
    random.seed(own)


def prepare(options: Options, device: torch.device) -> Setup:
    """The data and the model on its device. Raises UserError for what does not fit."""
    input_size = options.data.input_size or model_input_size(options.model.model)
    data = data_config(options, input_size)
    loaders = build_loaders(data, device)
    if options.data.num_classes not in (None, loaders.num_classes):
        raise UserError(
            f"--num-classes {options.data.num_classes} does not fit the data, which has {loaders.num_classes} classes"
        )
    remedies = build_remedies(options, loaders)
    recipe = remedies.change_recipe(build_recipe(options.precision))
    seed_generators(options.training.seed)
    name = options.model.model
    fetched = options.model.pretrained and not find_resume(options)
    model = build_model(name, loaders.num_classes, input_size, options.model.drop_path, recipe, pretrained=fetched)
    with users_mistakes():
        remedies.change_model(model)
    if options.model.finetune:
        which = Weights(options.model.weights)
        load_weights(model, options.model.finetune, new_head=not options.run.eval, which=which, classes=loaders.classes)
    if not options.run.fsdp:  # which takes the model to the device block by block
        model.to(device)
    set_matmul(model, options.precision.matmul)
    covered = check_coverage(model, name, input_size) if recipe.quantizes else None
    if options.run.checkpoint_activations:
        checkpoint_activations(model, name)
    if options.run.compile:
        model.compile()  # in place, so that parameters keep their names
    identity = {
        "model": name,
        "number of classes": loaders.num_classes,
        "input size": input_size,
        "recipe": recipe.describe(),
        "group size": GROUP_SIZE,
        "mean": data.preprocessing.mean,
        "std": data.preprocessing.std,
        CLASSES: loaders.classes,
    }
    evaluated = [n for n in SAME_ON_RESUME if n in REMEDIES and REMEDIES[n].in_evaluation]
    identity |= {flag(n): getattr(options.remedies, n) for n in evaluated}
    return Setup(options, device, data, loaders, model, remedies, identity, covered)


def build_mixup(options: Options, num_classes: int) -> Mixup | None:
    data = options.data
    if data.mixup + data.cutmix == 0:
        return None
    return Mixup(data.mixup, data.cutmix, label_smoothing=options.training.smoothing, num_classes=num_classes)


def build_criterion(setup: Setup) -> Criterion:
    """The training loss; with distillation it holds the teacher. Raises UserError for a model without such a head."""
    options, distillation = setup.options, setup.options.distillation
    base = base_criterion(options.data.mixup + options.data.cutmix > 0, options.training.smoothing)
    if distillation.distillation_type == "none":
        return base
    if not hasattr(setup.model, "set_distilled_training"):
        raise UserError(
            f"--distillation-type {distillation.distillation_type} needs a model with a distillation token "
            f"(deit_*_distilled_*), got --model {options.model.model}"
        )
    setup.model.set_distilled_training(True)
    num_classes, size = setup.loaders.num_classes, setup.data.input_size
    teacher = build_model(distillation.teacher_model, num_classes, size, 0.0, RECIPES["none"], "--teacher-model")
    load_weights(teacher, distillation.teacher_path, "--teacher-path", new_head=False, classes=setup.loaders.classes)
    theirs = teachers_preprocessing(options)
    if (theirs.mean, theirs.std) != (setup.data.preprocessing.mean, setup.data.preprocessing.std):
        teacher = nn.Sequential(Renormalization(setup.data.preprocessing, theirs), teacher)
    return DistillationLoss(
        base,
        teacher.to(setup.device),
        distillation.distillation_type,
        distillation.distillation_alpha,
        distillation.distillation_tau,
    )


def teachers_preprocessing(options: Options) -> Preprocessing:
    """How the teacher's images were normalized: as its checkpoint says, if it is ours, else as its configuration does.

    Our older checkpoints do not say, because all images were normalized by ImageNet's numbers.
    """
    distillation, default = options.distillation, Preprocessing()
    identity = read_weights(distillation.teacher_path).get("identity")
    if isinstance(identity, dict):
        return Preprocessing(identity.get("mean", default.mean), identity.get("std", default.std))
    in_files = DATA_SETS[options.data.data_set].one_file_per_image
    return preprocessing_of(distillation.teacher_model, "--teacher-model") if in_files else default


def output_directory(options: Options) -> Path:
    if options.run.output_dir is not None:
        return options.run.output_dir
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    return Path(processes.from_main(f"runs/{stamp}-{options.model.model}-{options.precision.quant}"))


def find_resume(options: Options) -> list[Path]:
    """The checkpoint to go on from, then those to take if it is damaged. Raises UserError if a run would be lost."""
    out, resume, evaluating = options.run.output_dir, options.run.resume, options.run.eval
    present = [] if out is None else checkpoint.find_all(out)
    if resume == "auto":
        if not present and not evaluating and checkpoint.holds_a_run(out):
            say(f"note    {out} holds a run without a checkpoint to go on from; it begins anew")
        return present
    elsewhere = resume and out is not None and Path(resume).resolve().parent != out.resolve()
    if out is not None and not evaluating and (elsewhere or not resume) and checkpoint.holds_a_run(out):
        raise UserError(f"{out} holds a run; pass --resume auto to go on with it, or another --output-dir")
    return [Path(resume)] if resume else []


def run_identity(setup: Setup) -> dict[str, object]:
    """The settings that a checkpoint must share with this run, so that the run can go on from it."""
    values = setup.options.flat()
    optimizer = setup.remedies.optimizer_class or torch.optim.AdamW
    identity = setup.identity | {OPTIMIZER: optimizer.__name__}
    identity |= {flag(name): values[name] for name in SAME_ON_RESUME}
    if processes.is_main():  # every process would read the same files
        identity[DATA] = fingerprint(setup.data, setup.loaders)
    return processes.from_main(identity)


def evaluated_identity(setup: Setup) -> dict[str, object]:
    """The settings that a checkpoint must share with this evaluation: all but how the user wants the images."""
    of_images = {"input size": "input_size", "mean": "mean", "std": "std"}
    chosen = {key for key, option in of_images.items() if option in setup.options.given}
    return {key: value for key, value in setup.identity.items() if key not in chosen}


def evaluate_only(setup: Setup) -> None:
    """Print the held-out numbers as one JSON object; write nothing."""
    options, model = setup.options, setup.model
    resume = find_resume(options)
    if resume:
        path, state = checkpoint.load_newest(resume, evaluated_identity(setup), implied_identity(setup.loaders.classes))
        fit_weights(model, state, path, "--resume", new_head=False, which=Weights(options.model.weights))
        checkpoint.restore_remedies(setup.remedies, state)
    elif options.run.resume:
        raise UserError(f"--eval --resume auto needs {options.run.output_dir / checkpoint.LAST}, which is missing")
    if options.run.fsdp:
        share_weights(model, setup.device)
        sharding.shard(model, setup.device)
    tested = evaluate(model, setup.loaders.val, setup.device)
    count_bad_images(setup.loaders, set())
    numbers = {f"test_{name}": value for name, value in tested.items()}
    say(json_line(numbers | evaluate_views(setup.remedies, model, setup.loaders, setup.device)))
    if not math.isfinite(tested["loss"]):
        raise NonFiniteSteps(f"the held-out loss is {tested['loss']}; the weights hold or give non-finite numbers")


def train(setup: Setup) -> None:
    """Train to the last epoch. Everything is checked before the output directory is made."""
    options, directory = setup.options, output_directory(setup.options)
    present = checkpoint.stamps(directory)
    resume = find_resume(options)
    identity = run_identity(setup)
    resumed, state = (
        checkpoint.load_newest(resume, identity, implied_identity(setup.loaders.classes)) if resume else (None, None)
    )
    training = build_training(setup, identity, directory, from_start=state is None)
    progress = training.progress
    if state is not None:
        progress.restore(state)
        if progress.epoch == training.epochs:
            say(f"{resumed} has all its {training.epochs} epochs done; best top-1 {progress.best_acc1:.2f} %")
            return
    if options.run.check_ranks is not None:
        done = progress.epoch * len(setup.loaders.train) + progress.sums.steps
        training.check = RankCheck(setup.model, training.step.optimizer, options.run.check_ranks, step=done)
    with exclusive(directory, "--output-dir") if processes.is_main() else nullcontext():
        if processes.is_main() and checkpoint.stamps(directory) != present:
            raise UserError(f"--output-dir {directory} must be free, another process was there until now; start again")
        if training.tracker is not None:
            oscillation_csv.start(directory / oscillation_csv.FILE_NAME, progress.epoch)
        describe(setup, directory, training.num_parameters)
        if state is not None:
            steps = progress.sums.steps
            steps_done = f" and {steps} of {len(setup.loaders.train)} steps" if steps else ""
            say(f"resume  {resumed}, {progress.epoch} of {training.epochs} epochs{steps_done} done")
        with RunLog(directory, log_parameters(options), progress.epoch) as log, training.interrupts:
            run_to_the_end(training, log, directory)
    say(f"best top-1 {progress.best_acc1:.2f} %; checkpoints and logs in {directory}")


def run_to_the_end(training: Training, log: RunLog, directory: Path) -> None:
    """Train the remaining epochs. Raises KeyboardInterrupt, with the way to go on, if the user interrupts the run."""
    try:
        training.run(log)
    except KeyboardInterrupt as error:
        saved = (directory / checkpoint.LAST).is_file()
        onward = f"--resume auto --output-dir {directory} goes on from the last checkpoint"
        told = onward if saved else f"{directory} has no checkpoint yet"
        raise KeyboardInterrupt(f"{error}; {told}" if str(error) else told) from error


def log_parameters(options: Options) -> dict[str, object]:
    """The options, the versions, the machine and the command, as the log has them."""
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in options.flat().items()}
    where = {"processes": str(options.num_processes)} | environment(options.run.device == "cuda")
    known = {ENVIRONMENT: where, COMMAND: shlex.join(sys.orig_argv)}
    return settings | {"torch": torch.__version__, "timm": timm.__version__} | known


def build_training(setup: Setup, identity: dict, directory: Path, from_start: bool) -> Training:
    """The run with its model, optimizer and remedies, as at its first step.

    The order matters: Q-EMA's averages and the model's start at the weights that all processes share; FSDP replaces
    parameters, so it comes before the optimizer; DDP wraps the model that the others keep.
    """
    options, model, loaders, device = setup.options, setup.model, setup.loaders, setup.device
    precision, training = options.precision, options.training
    criterion = build_criterion(setup)
    if precision.quant == "int4" and from_start:
        initialise_int4_steps(setup)
    num_parameters = sum(p.numel() for p in model.parameters())
    refuse_batch_norms(options, model)
    share_weights(model, device)
    remedies = setup.remedies
    with users_mistakes():
        remedies.attach(model)
    model_ema = ModelEmaV3(model, training.model_ema_decay) if training.model_ema_decay else None
    parallel = spread_over_processes(options, model, model_ema, device)
    optimizer = build_optimizer(options, model, device, remedies.optimizer_class)
    step = TrainStep(
        parallel,
        criterion,
        optimizer,
        device,
        mixup=build_mixup(options, loaders.num_classes),
        before_update=remedies.before_update,
        clip_grad=training.clip_grad,
        cuda_graph=options.run.cuda_graph,
        accumulate_steps=training.accumulate_steps,
    )
    interrupts = Interrupts(device)
    remedies.connect(RunForRemedies(model, step, loaders, setup.data, interrupts))
    tracker = build_tracker(setup) if precision.track_oscillation else None
    progress = checkpoint.RunState(
        identity,
        model,
        optimizer,
        build_scheduler(options, optimizer),
        model_ema,
        sums=EpochSums(),
        more={"skips": step.skips, "remedies": remedies},
        within={} if tracker is None else {"laboratory": tracker},  # the key of checkpoints that exist
        keep=options.run.keep_checkpoints,
        options=options.to_store(),
    )
    return Training(
        progress,
        step,
        loaders,
        setup.data,
        interrupts,
        directory,
        epochs=training.epochs,
        save_epochs=options.run.save_epochs,
        save_steps=options.run.save_steps,
        num_parameters=num_parameters,
        remedies=remedies,
        tracker=tracker,
    )


def refuse_batch_norms(options: Options, model: nn.Module) -> None:
    """Raise UserError if several processes would train a model with batch norms."""
    if processes.world_size() > 1 and running_statistics(model):
        raise UserError(
            f"--model {options.model.model} has batch norms, whose statistics would differ between processes; "
            "train it by one"
        )


def build_tracker(setup: Setup) -> OscillationTracker | None:
    """The tracker on the main process, because all processes have the same weights; None on the others.

    Every process builds it, so that all of them refuse a model that it does not support.
    """
    tracker = OscillationTracker(setup.model, setup.loaders.val.dataset, setup.device)
    return tracker if processes.is_main() else None


def initialise_int4_steps(setup: Setup) -> None:
    """INT4's step sizes start from the first batch of the calibration order."""
    set_epoch(setup.loaders.calibration, setup.data, CALIBRATION_ORDER)
    images, _ = next(iter(setup.loaders.calibration))
    with autocast(setup.device):
        initialise_steps(setup.model, images.to(setup.device))


def spread_over_processes(
    options: Options, model: nn.Module, model_ema: ModelEmaV3 | None, device: torch.device
) -> nn.Module:
    """The model to call in a training step: sharded in place, wrapped by DDP, or as it is."""
    if options.run.fsdp:
        for whole in (model,) if model_ema is None else (model, model_ema.module):
            sharding.shard(whole, device)
    elif processes.world_size() > 1 and not options.run.cuda_graph:  # with a graph, the step averages gradients itself
        return processes.data_parallel(model, device)
    return model


def describe(setup: Setup, directory: Path, num_parameters: int) -> None:
    """Say in a few lines what is about to run."""
    options, loaders, device = setup.options, setup.loaders, setup.device
    quant, held_out = options.precision.quant, sum(processes.gather(len(loaders.val.dataset)))
    covered = setup.coverage
    num_linears = 0 if covered is None else len(covered.having(Status.QUANTIZED))
    say(f"model   {options.model.model}: {num_parameters:,} parameters, {num_linears} linears in {quant}")
    if covered is not None:
        say(f"covers  {covered.summary()}")
    arithmetic = "fp8" if uses_fp8(setup.model) else "bf16" if device.type == "cuda" else "fp32"
    how = "simulated" if quant == "int4" else "multiplied"
    say(f"recipe  {setup.identity['recipe']}" + (f", {how} in {arithmetic}" if quant != "none" else ""))
    if options.run.compile and device.type == "cpu":
        say("note    --compile is for GPUs; on a CPU it gains nothing")
    if options.remedies.q_ema and options.remedies.q_ramping:
        say("note    the paper does not study Q-EMA and Q-Ramping together (C.4); detection measures plain rounding")
    say(
        f"data    {setup.data.name}: {len(loaders.train.dataset):,} training and {held_out:,} held-out images "
        f"of {setup.data.input_size} px, {loaders.num_classes} classes"
    )
    how = ", weights sharded" if options.run.fsdp else ""
    world = f"{processes.world_size()} x {device.type}"
    say(f"run     {directory} on {world}, batch {options.training.batch_size} each{how}")
