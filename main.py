"""Train or evaluate a Vision Transformer with its block linears in MXFP4: wiring and exit codes."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import random
import sys
import traceback
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.layers import to_2tuple
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

import timm
from data.fingerprint import fingerprint
from datasets import (
    CALIBRATION_ORDER,
    BadImages,
    DataConfig,
    Loaders,
    build_loaders,
    set_epoch,
)
from engine import TrainStep, autocast, evaluate
from quantization import (
    RECIPES,
    Dampen,
    Freeze,
    Int4Linear,
    Int4Recipe,
    OsciReset,
    QEma,
    RampingAdamW,
    Recipe,
    has_fp8,
    initialise_steps,
    quant_linears,
    set_matmul,
)
from runtime import processes, sharding
from runtime.determinism import deterministic
from runtime.errors import NonFiniteSteps, RanksDiffer, Stopped, UserError
from runtime.files import exclusive
from runtime.interrupts import Interrupts
from runtime.nonfinite import running_statistics
from runtime.rank_check import RankCheck
from tracking import oscillation_csv
from tracking.laboratory import Laboratory
from training import checkpoint
from training.loop import QRamping, Training, count_bad_images
from training.losses import DistillationLoss, base_criterion
from training.options import SAME_ON_RESUME, build_recipe, parse_args
from training.run_log import RunLog, say


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
        try:
            model = timm.create_model(name, **options)
        except TypeError as error:
            if drop_path > 0 or "drop_path_rate" not in str(error):
                raise
            del options["drop_path_rate"]  # a model without stochastic depth
            model = timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        if recipe.quantizes and "quant" in str(error):
            raise UserError(
                "--quant needs a Vision Transformer of timm with plain blocks (deit_*, vit_*) or a Swin Transformer "
                f"(swin_*), got --model {name}"
            ) from error
        if "drop_path_rate" in str(error):
            raise UserError(f"{option} {name} has no stochastic depth, got --drop-path {drop_path}; give 0") from error
        raise UserError(
            f"{option} {name} cannot be built for --input-size {input_size}: {error}; its own is {own_size}"
        ) from error
    patch, _ = to_2tuple(getattr(getattr(model, "patch_embed", None), "patch_size", 1))
    if input_size < patch or input_size % patch:
        raise UserError(f"--input-size must be a multiple of {name}'s patch size {patch}, got {input_size}")
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
    groups = param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=no_decay)
    options = {"lr": args.lr * args.batch_size * processes.world_size() / 512, "betas": (0.9, 0.999), "eps": 1e-8}
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


def output_directory(args: argparse.Namespace) -> Path:
    if args.output_dir is not None:
        return args.output_dir
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    return Path(processes.from_main(f"runs/{stamp}-{args.model}-{args.quant}"))


def find_resume(args: argparse.Namespace) -> list[Path]:
    """The checkpoint to go on from, then those to take if it is damaged. Raises UserError if a run would be lost."""
    out = args.output_dir
    present = [] if out is None else checkpoint.find_all(out)
    if args.resume == "auto":
        if not present and not args.eval and checkpoint.holds_a_run(out):
            say(f"note    {out} holds a run without a checkpoint to go on from; it begins anew")
        return present
    elsewhere = args.resume and out is not None and Path(args.resume).resolve().parent != out.resolve()
    if out is not None and not args.eval and (elsewhere or not args.resume) and checkpoint.holds_a_run(out):
        raise UserError(f"{out} holds a run; pass --resume auto to go on with it, or another --output-dir")
    return [Path(args.resume)] if args.resume else []


def run(args: argparse.Namespace) -> None:
    device = processes.start(args.device)
    try:
        with deterministic(device) if args.deterministic else nullcontext():
            run_on(args, device)
    except BaseException as error:
        end_loaders(error)
        raise


def end_loaders(error: BaseException | None) -> None:
    """End the loaders' processes that `error` has left behind: they ignore SIGTERM, so Python would wait for them.

    They end with their iterator, which the frames that the error has passed through still hold.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


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

    seed = args.seed * processes.world_size() + processes.rank()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    model = build_model(args.model, loaders.num_classes, args.input_size, args.drop_path, recipe)
    if args.finetune:
        checkpoint.load_weights(model, args.finetune, new_head=not args.eval)
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
    processes.copy_from_main((*model.parameters(), *model.buffers()), device)


def train(
    args: argparse.Namespace,
    model: nn.Module,
    identity: dict,
    data: DataConfig,
    loaders: Loaders,
    device: torch.device,
) -> None:
    """Everything is checked before the output directory is made."""
    directory = output_directory(args)
    present = checkpoint.stamps(directory)
    resume = find_resume(args)
    identity["optimizer"] = "RampingAdamW" if args.q_ramping else "AdamW"
    identity |= {f"--{name.replace('_', '-')}": getattr(args, name) for name in SAME_ON_RESUME}
    if processes.is_main():  # both data sets are wrapped: by the order of their batches, by the processes' shares
        halves = (fingerprint(loader.dataset.dataset) for loader in (loaders.train, loaders.val))
        identity["data"] = " + ".join(halves)
    identity = processes.from_main(identity)
    resumed, state = checkpoint.load_newest(resume, identity) if resume else (None, None)
    criterion = build_criterion(args, model, loaders.num_classes, device)
    if args.quant == "int4" and state is None:
        set_epoch(loaders.calibration, data, CALIBRATION_ORDER)
        with autocast(device):
            initialise_steps(model, next(iter(loaders.calibration))[0].to(device))
    num_parameters = sum(p.numel() for p in model.parameters())
    if processes.world_size() > 1 and running_statistics(model):
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
    elif processes.world_size() > 1 and not args.cuda_graph:
        parallel = processes.data_parallel(model, device)
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
    if not processes.is_main():
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
        done = progress.epoch * len(loaders.train) + progress.sums.steps
        check = RankCheck(model, optimizer, args.check_ranks, step=done)
    with exclusive(directory, "--output-dir") if processes.is_main() else nullcontext():
        if processes.is_main() and checkpoint.stamps(directory) != present:
            raise UserError(f"--output-dir {directory} must be free, another process was there until now; start again")
        if laboratory is not None:
            oscillation_csv.start(directory / oscillation_csv.FILE_NAME, progress.epoch)
        describe(args, model, identity["recipe"], loaders, device, directory, num_parameters)
        if state is not None:
            steps = progress.sums.steps
            steps_done = f" and {steps} of {len(loaders.train)} steps" if steps else ""
            say(f"resume  {resumed}, {progress.epoch} of {args.epochs} epochs{steps_done} done")
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        settings |= {"torch": torch.__version__, "timm": timm.__version__}
        training = Training(
            progress,
            step,
            loaders,
            data,
            interrupts,
            directory,
            epochs=args.epochs,
            save_epochs=args.save_epochs,
            save_steps=args.save_steps,
            num_parameters=num_parameters,
            q_ema=q_ema,
            answer=answer,
            ramping=ramping,
            laboratory=laboratory,
            check=check,
        )
        with RunLog(directory, settings, progress.epoch) as log, interrupts:
            try:
                training.run(log)
            except KeyboardInterrupt as error:
                saved = (directory / checkpoint.LAST).is_file()
                onward = f"--resume auto --output-dir {directory} goes on from the last checkpoint"
                raise KeyboardInterrupt(onward if saved else f"{directory} has no checkpoint yet") from error
        say(f"best top-1 {progress.best_acc1:.2f} %; checkpoints and logs in {directory}")


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
    held_out = sum(processes.gather(len(loaders.val.dataset)))
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
    say(f"run     {directory} on {processes.world_size()} x {device.type}, batch {args.batch_size} each{how}")


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
    except KeyboardInterrupt as error:
        message, code = "; ".join(filter(None, ("main.py: interrupted", str(error)))), 130
    except Exception as error:
        # A collective breaks off where another process has ended; that one says why.
        broken_off = isinstance(error, RuntimeError) and processes.another_has_failed()
        if broken_off or not processes.first_to_report(repr(error)):
            return 1
        raise
    if code and processes.first_to_report(message):
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    if code in (0, 1, os.EX_TEMPFAIL):  # where all processes end; after another failure it would wait for the rest
        processes.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
