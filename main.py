"""Train or evaluate a Vision Transformer with its block linears in MXFP4: arguments, wiring, the epoch loop."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import distributed
import oscillation_log
import sharding
import timm
from datasets import (
    CALIBRATION_ORDER,
    DATA_SETS,
    DOWNLOADABLE,
    IN_FILES,
    RAND_AUGMENT,
    BadImages,
    DataConfig,
    Loaders,
    build_loaders,
    set_epoch,
    take_bad_images,
)
from determinism import deterministic
from engine import EpochSums, TrainStep, autocast, evaluate, train_one_epoch
from errors import NonFiniteSteps, RanksDiffer, Stopped, UserError
from fingerprint import fingerprint
from interrupts import Interrupts
from laboratory import Laboratory
from losses import DistillationLoss, base_criterion
from quantization import (
    BACKWARD,
    FORWARD,
    OSCILLATION_THRESHOLD,
    QUANTIZERS,
    RECIPES,
    Dampen,
    Element,
    Freeze,
    Int4Linear,
    Int4Recipe,
    Matmul,
    OsciReset,
    QEma,
    RampingAdamW,
    Recipe,
    Reduction,
    Rounding,
    Scaling,
    detect_oscillation,
    has_fp8,
    initialise_steps,
    lerp_unless,
    quant_linears,
    set_matmul,
    take_lost_groups,
    update_periods,
)
from quantization.freeze import FIRST_THRESHOLD, MOMENTUM
from quantization.osci_reset import INTERVAL, START
from quantization.shards import local
from rank_check import RankCheck
from run_log import RunLog, say

# DeiT's recipe (Touvron et al. 2021, Table 9) over the paper's 90 epochs. Models may differ, MODEL_RECIPES, and data
# sets, datasets.DATA_SETS: the user's options come first, then the data set's, the model's, and these.
DEFAULTS = {
    "model": "deit_small_patch16_224",
    "input_size": None,  # the model's own
    "epochs": 90,
    "batch_size": 256,
    "lr": 5e-4,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 5,
    "weight_decay": 0.05,
    "clip_grad": 0.0,
    "drop_path": 0.1,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "aa": RAND_AUGMENT,
    "color_jitter": 0.3,
    "reprob": 0.25,
    "repeats": 3,
    "model_ema_decay": 0.99996,
    "num_workers": 8,
}
# What differs by how a model's name begins, a longer beginning later. Swin: Liu et al. 2021, appendix A2.1, and the
# official config.py, whose learning rates 5e-4, 5e-6 and 5e-7 all scale with the batch over 512: at the paper's 1,024
# images they are 1e-3, 1e-5 and 1e-6, as above.
MODEL_RECIPES = {
    "swin_": {"warmup_epochs": 20, "clip_grad": 5.0, "drop_path": 0.2, "repeats": 1, "model_ema_decay": 0.0},
    "swin_small_": {"drop_path": 0.3},
    "swin_base_": {"drop_path": 0.5},
}
# A resumed run must train as the first part did, so these must not change; weights can always go to --finetune.
# (--bad-images may: a first part that did not stop is the same either way.)
SAME_ON_RESUME = (
    *("epochs", "batch_size", "lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "model_ema_decay"),
    *("drop_path", "smoothing", "mixup", "cutmix", "aa", "color_jitter", "reprob", "repeats", "data_set", "seed"),
    *("accumulate_steps", "keep_last_batch"),
    *("clip_grad", "q_ramping_k1", "q_ramping_k2", "q_ramping_steps"),
    *("dampen", "dampen_reduction", "freeze"),
    *("osci_reset", "osci_reset_interval", "osci_reset_threshold", "osci_reset_start"),
    *("distillation_type", "distillation_alpha", "distillation_tau", "teacher_model"),
)
EXIT_CODES = """exit codes: 0 done, 1 diverged, 2 something in the command must change, 130 interrupted,
75 stopped by SIGTERM or SIGUSR1 with a checkpoint: start again with --resume auto. A second signal ends at once"""
Q_EMA_BETA, Q_RAMPING = 0.998, {"q_ramping_k1": 16.0, "q_ramping_k2": 5, "q_ramping_steps": 30}
DISTILLATION = {"distillation_alpha": 0.5, "distillation_tau": 1.0, "teacher_model": None, "teacher_path": None}
RECIPE_SWITCHES = (
    *("quantizers", "backward_rounding", "backward_operands", "scaling", "forward_element", "backward_element"),
)
OSCILLATION_ANSWERS = ("q_ema", "q_ramping", "dampen", "freeze", "osci_reset")


class Parser(argparse.ArgumentParser):
    """Raises UserError for a bad argument."""

    def error(self, message: str) -> None:
        raise UserError(f"{' '.join(message.split())}; see --help")


def number(kind: type, low: float, high: float = float("inf"), open_high: bool = False):
    """An argparse type: a finite `kind` in [low, high], or in [low, high) if `open_high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low <= value < high if open_high else low <= value <= high) or value == float("inf"):
            limits = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"needs {'a whole number' if kind is int else 'a number'} {limits}"
                f"{', exclusive' if open_high else ''}, got {text!r}"
            )
        return value

    return parse


def quantizer_names(text: str) -> tuple[str, ...]:
    """An argparse type: some of q1 .. q6, separated by commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in QUANTIZERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"needs some of {','.join(QUANTIZERS)}, got {unknown[0]!r}")
    return tuple(name for name in QUANTIZERS if name in names)


def build_parser() -> Parser:
    positive, count = number(int, 1), number(int, 0)
    amount, share = number(float, 0), number(float, 0, 1)
    parser = Parser(
        prog="main.py", description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawTextHelpFormatter
    )

    def recipe_option(group, flag: str, kind, text: str) -> None:
        """An option whose default depends on the data set and the model."""
        name = flag[2:].replace("-", "_")
        defaults = {"default": DEFAULTS[name] if DEFAULTS[name] is not None else "the model's own"}
        others = {f"{beginning}*": options for beginning, options in MODEL_RECIPES.items()}
        others["DIGITS"] = DATA_SETS["DIGITS"].options
        defaults |= {where: options[name] for where, options in others.items() if name in options}
        group.add_argument(flag, type=kind, help=f"{text} ({'; '.join(f'{k}: {v}' for k, v in defaults.items())})")

    group = parser.add_argument_group("low precision")
    group.add_argument("--quant", choices=RECIPES, default="none", help="recipe of the block linears (default: none)")
    elements = [e.value for e in Element]
    group.add_argument(
        "--quantizers", type=quantizer_names, metavar="q1,q3,...", help="the recipe's quantizers that stay on (all)"
    )
    roundings = (Rounding.STOCHASTIC.value, Rounding.NEAREST.value)
    group.add_argument("--backward-rounding", choices=roundings, help="rounding of q3 to q6 (the recipe's)")
    group.add_argument(
        "--backward-operands",
        choices=("double", "direct"),
        help="q4 and q6 read the weights and inputs quantized before, or as they are (the recipe's)",
    )
    group.add_argument("--scaling", choices=[s.value for s in Scaling], help="scales of all quantizers (the recipe's)")
    group.add_argument("--forward-element", choices=elements, help="format of q1 and q2 (the recipe's)")
    group.add_argument("--backward-element", choices=elements, help="format of q3 to q6 (the recipe's)")
    group.add_argument("--q-ema", action="store_true", help="round weights towards their moving average")
    beta = number(float, 0, 1, open_high=True)
    group.add_argument("--q-ema-beta", type=beta, help=f"decay of that average (default: {Q_EMA_BETA})")
    group.add_argument("--q-ramping", action="store_true", help="update oscillating weights less often")
    group.add_argument("--q-ramping-k1", type=number(float, 1e-6), help="oscillation ratio a period step (default: 16)")
    group.add_argument("--q-ramping-k2", type=count, help="updates a period step (default: 5)")
    group.add_argument("--q-ramping-steps", type=positive, help="steps of a detection (default: 30)")
    group.add_argument(
        "--dampen", type=amount, metavar="WEIGHT", help="pull weights to their rounded values (Nagel 2022)"
    )
    group.add_argument(
        "--dampen-reduction",
        choices=[r.value for r in Reduction],
        help="of that loss in a layer: all weights' sum, or Nagel et al.'s, over the input channels (default: sum)",
    )
    group.add_argument(
        "--freeze",
        type=number(float, 2 * MOMENTUM, FIRST_THRESHOLD),
        metavar="THRESHOLD",
        help="freeze weights that oscillate more often than this in the end, such as 0.01 (Nagel et al.)",
    )
    group.add_argument(
        "--osci-reset",
        action="store_true",
        default=None,
        help="put oscillating weights where they are rounded to (TetraJet-v2)",
    )
    group.add_argument(
        "--osci-reset-interval", type=positive, help=f"steps (default: {INTERVAL}, but at most a tenth of the run)"
    )
    group.add_argument(
        "--osci-reset-threshold",
        type=number(float, 1e-6),
        help=f"oscillation ratio from which to reset (default: {OSCILLATION_THRESHOLD})",
    )
    group.add_argument("--osci-reset-start", type=share, help=f"share of the run before the first (default: {START})")
    group.add_argument(
        "--matmul",
        choices=[m.value for m in Matmul],
        default="auto",
        help="how quantized operands are multiplied: speed, not results (default: fp8 where the GPU has it)",
    )

    group.add_argument(
        "--track-oscillation",
        action="store_true",
        help=f"measure how the weights oscillate at the end of every epoch, into {oscillation_log.FILE_NAME}",
    )

    group = parser.add_argument_group("model")
    recipe_option(group, "--model", str, "any Vision Transformer of timm; any timm model with --quant none")
    recipe_option(group, "--drop-path", number(float, 0, 1, open_high=True), "rate of stochastic depth")
    group.add_argument("--finetune", type=Path, metavar="PATH", help="start from these weights (DeiT's or ours)")

    group = parser.add_argument_group("data")
    sets = "\n".join(f"{name}: {info.description}" for name, info in DATA_SETS.items())
    group.add_argument("--data-set", choices=DATA_SETS, default="DIGITS", help=f"default: DIGITS\n{sets}")
    group.add_argument("--data-path", metavar="DIR", help="where the data set is")
    group.add_argument("--download", action="store_true", help="let torchvision fetch FASHION or CIFAR to --data-path")
    group.add_argument(
        "--bad-images",
        choices=[choice.value for choice in BadImages],
        default="stop",
        help="skip: train on the next image in place of a file that cannot be read (default: stop)",
    )
    group.add_argument("--num-classes", type=positive, help="refuse data with another number of classes")
    recipe_option(group, "--input-size", positive, "pixels an image side")
    recipe_option(group, "--num-workers", number(int, 0, 512), "loader processes for each training process")
    recipe_option(group, "--repeats", number(int, 1, 100), "augmented copies of an image in an epoch; 1 for none")
    recipe_option(group, "--aa", str, "timm's automatic augmentation, or none")
    recipe_option(group, "--color-jitter", number(float, 0, 10), "strength; replaced by --aa where that is on")
    recipe_option(group, "--reprob", share, "probability of random erasing")
    group.add_argument(
        "--keep-last-batch",
        action="store_true",
        help="train on the images that do not fill a batch, too; Mixup leaves them as they are if they do not pair off",
    )
    recipe_option(group, "--mixup", amount, "alpha of Mixup; 0 for none")
    recipe_option(group, "--cutmix", amount, "alpha of CutMix; 0 for none")

    group = parser.add_argument_group("training")
    recipe_option(group, "--epochs", positive, "length of the run")
    recipe_option(group, "--batch-size", positive, "images a step and process")
    group.add_argument(
        "--accumulate-steps", type=positive, default=1, help="micro-batches that a batch is cut into (default: 1)"
    )
    recipe_option(group, "--lr", amount, "learning rate at a global batch of 512; scaled linearly")
    recipe_option(group, "--min-lr", amount, "end of the cosine")
    recipe_option(group, "--warmup-lr", amount, "start of the warm-up")
    recipe_option(group, "--warmup-epochs", count, "length of the warm-up")
    recipe_option(group, "--weight-decay", amount, "not on biases, norms, tokens and position embeddings")
    recipe_option(group, "--clip-grad", amount, "largest norm of all gradients together; 0: any")
    recipe_option(group, "--smoothing", number(float, 0, 1, open_high=True), "label smoothing")
    recipe_option(
        group, "--model-ema-decay", number(float, 0, 1, open_high=True), "moving average of the model; 0: none"
    )
    group.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="default: 0")

    group = parser.add_argument_group("distillation")
    group.add_argument("--distillation-type", choices=("none", "soft", "hard"), default="none", help="default: none")
    group.add_argument("--distillation-alpha", type=share, help="weight of the teacher (default: 0.5)")
    group.add_argument("--distillation-tau", type=number(float, 1e-6), help="temperature of soft (default: 1.0)")
    group.add_argument("--teacher-model", help="any timm model")
    group.add_argument("--teacher-path", type=Path, metavar="PATH", help="the teacher's weights")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the model, on a GPU; the first step takes minutes"
    )
    group.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="keep the inputs of the blocks alone and compute the rest again in the backward pass: less memory",
    )
    group.add_argument(
        "--cuda-graph", action="store_true", help="replay each step's forward and backward pass; one process on a GPU"
    )
    group.add_argument(
        "--fsdp", action="store_true", help="shard weights and optimizer states over torchrun's processes"
    )
    group.add_argument(
        "--check-ranks", type=positive, metavar="N", help="compare the processes every N steps (default: never)"
    )
    group.add_argument("--output-dir", type=Path, metavar="DIR", help="default: runs/TIME-MODEL-QUANT")
    group.add_argument(
        "--resume", metavar="PATH", help="go on from this checkpoint; auto: the last intact one in --output-dir"
    )
    group.add_argument("--save-epochs", type=positive, default=1, metavar="N", help="epochs a checkpoint (default: 1)")
    group.add_argument(
        "--save-steps", type=count, default=0, metavar="N", help="steps a checkpoint, besides; 0: none (default: 0)"
    )
    group.add_argument(
        "--keep-checkpoints", type=positive, default=2, metavar="K", help="the last K stay, and the best (default: 2)"
    )
    group.add_argument("--deterministic", action="store_true", help="on a GPU: the same bits again, if more slowly")
    group.add_argument("--eval", action="store_true", help="evaluate --resume or --finetune and stop")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments with the data set's and the model's defaults filled in.

    Raises UserError for options that contradict one another.
    """
    args = build_parser().parse_args(argv)
    check_low_precision(args)
    if args.q_ema_beta is not None and not args.q_ema:
        raise UserError(f"--q-ema-beta {args.q_ema_beta} has no effect without --q-ema; add it")
    args.q_ema_beta = Q_EMA_BETA if args.q_ema_beta is None else args.q_ema_beta
    for name, default in Q_RAMPING.items():
        value = getattr(args, name)
        if value is not None and not args.q_ramping:
            raise UserError(f"--{name.replace('_', '-')} {value} has no effect without --q-ramping; add it")
        setattr(args, name, default if value is None else value)
    if args.dampen is not None:
        args.dampen_reduction = args.dampen_reduction or Reduction.SUM.value
    if args.osci_reset:
        threshold, start = args.osci_reset_threshold, args.osci_reset_start
        args.osci_reset_threshold = OSCILLATION_THRESHOLD if threshold is None else threshold
        args.osci_reset_start = START if start is None else start
    data_set = DATA_SETS[args.data_set].options
    own = model_recipe(args.model or data_set.get("model", DEFAULTS["model"])) | data_set
    if args.model is not None:
        own["input_size"] = None  # the data set's size goes with the data set's model
    for name in DEFAULTS:
        if getattr(args, name) is None:
            setattr(args, name, own[name])
    if args.mixup + args.cutmix > 0 and args.batch_size % 2:
        raise UserError(f"Mixup and CutMix pair images, so --batch-size must be even, got {args.batch_size}")
    if args.batch_size % args.accumulate_steps:
        raise UserError(
            f"--accumulate-steps must divide --batch-size, got {args.accumulate_steps} for {args.batch_size}; "
            "change one of them"
        )
    check_nothing_in_vain(args)
    if args.distillation_type != "none" and (args.teacher_model is None or args.teacher_path is None):
        raise UserError(f"--distillation-type {args.distillation_type} needs --teacher-model and --teacher-path")
    if args.bad_images == "skip" and args.data_set not in IN_FILES:
        raise UserError(
            f"--bad-images skip is about image files ({', '.join(IN_FILES)}), got --data-set {args.data_set}; drop it"
        )
    if args.resume and args.finetune:
        raise UserError("--resume goes on with a run and --finetune starts one; give one of them")
    if args.resume == "auto" and args.output_dir is None:
        raise UserError("--resume auto looks into --output-dir; give one")
    if args.eval and not (args.resume or args.finetune):
        raise UserError("--eval needs weights; give --resume or --finetune")
    if args.eval and args.track_oscillation:
        raise UserError("--track-oscillation measures training, got --eval; leave one of them out")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that PyTorch can use, found none; use --device cpu or auto")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.cuda_graph and args.device == "cpu":
        raise UserError("--cuda-graph needs a GPU, got --device cpu; drop one of them")
    if args.cuda_graph and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--cuda-graph is for one process, got {os.environ['WORLD_SIZE']} by torchrun; drop it")
    if args.cuda_graph and args.checkpoint_activations:
        raise UserError(
            "--checkpoint-activations sets back the random generator, which --cuda-graph cannot record; drop one"
        )
    check_processes(args, int(os.environ.get("WORLD_SIZE", "1")))
    if args.matmul != "auto" and args.quant in ("none", "int4"):
        raise UserError(
            f"--matmul {args.matmul} multiplies quantized operands, got --quant {args.quant}; add --quant mxfp4"
        )
    if args.matmul == "fp8" and not has_fp8(torch.device(args.device)):
        raise UserError(
            "--matmul fp8 needs a GPU with FP8 tensor cores (compute capability 8.9 or later), "
            f"got {torch.cuda.get_device_name() if args.device == 'cuda' else args.device}; use auto or bf16"
        )
    return args


def model_recipe(name: str) -> dict:
    """The defaults of the model's own recipe on ImageNet."""
    recipe = dict(DEFAULTS)
    for beginning, options in MODEL_RECIPES.items():
        if name.startswith(beginning):
            recipe |= options
    return recipe


def check_low_precision(args: argparse.Namespace) -> None:
    """Raises UserError for options that have nothing to act on, or that exclude one another."""
    switch = next((name for name in RECIPE_SWITCHES if getattr(args, name) is not None), None)
    answers = [name for name in OSCILLATION_ANSWERS if getattr(args, name) not in (None, False)]
    first = f"--{answers[0].replace('_', '-')}" if answers else None
    if args.quant in ("none", "int4"):
        if switch:
            option = f"--{switch.replace('_', '-')}"
            raise UserError(f"{option} changes an MXFP4 recipe, got --quant {args.quant}; add --quant mxfp4")
        if answers:
            verb = "rounds" if args.q_ema else "needs"
            raise UserError(f"{first} {verb} quantized weights, got --quant {args.quant}; add --quant mxfp4")
    if len(answers) > 1 and answers != ["q_ema", "q_ramping"]:
        second = f"--{answers[1].replace('_', '-')}"
        raise UserError(f"{first} and {second} answer oscillation each in its own way, no paper joins them; drop one")
    if answers and args.quantizers is not None and "q2" not in args.quantizers:
        given = ",".join(args.quantizers)
        raise UserError(f"{first} is about weights that q2 quantizes, got --quantizers {given}; add q2")
    for names, quantizers in (("forward_element", FORWARD), ("backward_rounding backward_element", BACKWARD)):
        given = next((name for name in names.split() if getattr(args, name) is not None), None)
        if given and args.quantizers is not None and not set(quantizers) & set(args.quantizers):
            raise UserError(
                f"--{given.replace('_', '-')} is about {','.join(quantizers)}, got --quantizers "
                f"{','.join(args.quantizers)}; add one of them"
            )
    needed = {"dampen_reduction": "dampen"}
    needed |= {f"osci_reset_{name}": "osci_reset" for name in ("interval", "threshold", "start")}
    for name, needs in needed.items():
        if getattr(args, name) is not None and getattr(args, needs) is None:
            option, other = (f"--{n.replace('_', '-')}" for n in (name, needs))
            raise UserError(f"{option} {getattr(args, name)} has no effect without {other}; add it")


def check_nothing_in_vain(args: argparse.Namespace) -> None:
    """Raises UserError for options of data and distillation that have nothing to act on; fills in defaults."""
    if args.download and args.data_set not in DOWNLOADABLE:
        raise UserError(f"--download fetches {', '.join(DOWNLOADABLE)}, got --data-set {args.data_set}; drop it")
    if args.data_path is not None and not DATA_SETS[args.data_set].needs_path:
        raise UserError(f"--data-path has no effect on --data-set {args.data_set}, which needs no files; drop it")
    kind = args.distillation_type
    for name, default in DISTILLATION.items():
        option, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None and kind == "none":
            raise UserError(f"{option} {value} has no effect without --distillation-type; add it")
        if value is not None and kind == "hard" and name == "distillation_tau":
            raise UserError(f"{option} {value} is the temperature of --distillation-type soft, got hard; drop it")
        setattr(args, name, default if value is None else value)


def check_processes(args: argparse.Namespace, processes: int) -> None:
    """Raises UserError for what needs several processes, and for what sharding does not go with."""
    for option, given in (("--fsdp", args.fsdp), ("--check-ranks", args.check_ranks is not None)):
        if given and processes == 1:
            raise UserError(f"{option} is for several processes, got one; start main.py by torchrun or drop it")
    if args.check_ranks is not None and args.eval:
        raise UserError("--check-ranks compares processes that train, got --eval; leave one of them out")
    if not args.fsdp:
        return
    whole_weights = ("dampen", "freeze", "osci_reset", "track_oscillation", "compile")
    other = next((name for name in whole_weights if getattr(args, name) not in (None, False)), None)
    if other or args.quant == "int4":
        option = f"--{other.replace('_', '-')}" if other else "--quant int4"
        raise UserError(f"--fsdp shards the weights, and {option} has no way with sharded ones; drop one of them")


def build_recipe(args: argparse.Namespace) -> Recipe | Int4Recipe:
    recipe = RECIPES[args.quant]
    if isinstance(recipe, Int4Recipe):
        return recipe
    if args.quantizers is not None:
        recipe = recipe.with_only(args.quantizers)
    if args.backward_rounding is not None:
        recipe = recipe.with_quantizers(BACKWARD, rounding=args.backward_rounding)
    if args.backward_operands is not None:
        recipe = replace(recipe, double=args.backward_operands == "double")
    if args.scaling is not None:
        recipe = recipe.with_quantizers(QUANTIZERS, scaling=args.scaling)
    if args.forward_element is not None:
        recipe = recipe.with_quantizers(FORWARD, element=args.forward_element)
    if args.backward_element is not None:
        recipe = recipe.with_quantizers(BACKWARD, element=args.backward_element)
    return recipe.with_q_ema(args.q_ema_beta) if args.q_ema else recipe


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
    """The run's directory, made if need be. Raises UserError if it holds another run."""
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
    share_weights(model, device)
    q_ema = QEma(model) if args.q_ema else None
    model_ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema_decay else None
    parallel = model
    if args.fsdp:
        for whole in (model,) if model_ema is None else (model, model_ema.module):
            sharding.shard(whole, device)
    elif distributed.world_size() > 1:
        # Averages and counters advance alike on every rank, so buffers need no broadcast.
        device_ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)
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

    def after_step() -> None:
        """Only the laboratory takes part in a skipped step, in which nothing moves."""
        if q_ema is not None:
            q_ema.update(step.skip)
        # These baselines count steps on the host. It waits while the device still has the optimizer's work.
        if answer is not None and not step.skips.newest():
            answer.update()
        if model_ema is not None:
            update_average(model_ema, model, step.skip)
        if laboratory is not None:
            laboratory.after_step()
        if check is not None:
            check.after_step()
        done = progress.sums.steps
        if interrupts.agreed(None if done == num_steps else done):
            stop()
        due = args.save_steps and (progress.epoch * num_steps + done) % args.save_steps == 0
        if due and not (done == num_steps and saves_epoch(progress.epoch)):
            save()

    saved = None

    def save(best: bool = False) -> None:
        nonlocal saved
        step.settle()
        progress.sums.skipped_steps = step.skips.count
        progress.sums.lost_groups += int(take_lost_groups(device))
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
                save()  # no skipped step has touched it
                raise
            scheduler.step(epoch + 1)
            if laboratory is not None:
                log.oscillation(laboratory.after_epoch(epoch, (epoch + 1) * num_steps))
            tested = evaluate(model, loaders.val, device)
            numbers["bad_images"] = count_bad_images(loaders, named)
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


def count_bad_images(loaders: Loaders, named: set[str]) -> int:
    """Images of all processes that could not be read since the last call; says which, but for those in `named`."""
    counted = [take_bad_images(loader) for loader in (loaders.train, loaders.val)]
    gathered = distributed.gather((sum(count for count, _ in counted), set().union(*(paths for _, paths in counted))))
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
        say("note    --compile is for GPUs; on a CPU it takes minutes and gains nothing")
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
    if code == 0:
        distributed.stop()  # which would wait for the other processes after a failure
    elif distributed.first_to_report(message):
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
