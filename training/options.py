"""What the command line offers, with its defaults, and what it refuses."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from datasets import DATA_SETS, DOWNLOADABLE, IN_FILES, RAND_AUGMENT, SMALL_DATA, BadImages
from quantization import (
    BACKWARD,
    FORWARD,
    OSCILLATION_THRESHOLD,
    QUANTIZERS,
    RECIPES,
    Element,
    Int4Recipe,
    Matmul,
    Recipe,
    Reduction,
    Rounding,
    Scaling,
    has_fp8,
)
from quantization.remedies.freeze import FIRST_THRESHOLD, MOMENTUM
from quantization.remedies.osci_reset import INTERVAL, START
from runtime.errors import UserError
from tracking.oscillation_csv import FILE_NAME

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


LARGEST = {int: 2**31 - 1, float: 1e30}  # what C and fp32 take


def number(kind: type, low: float, high: float | None = None, open_high: bool = False):
    """An argparse type: a `kind` in [low, high], or in [low, high) if `open_high`; `high` is LARGEST[kind] if None."""
    highest = LARGEST[kind] if high is None else high

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low <= value < highest if open_high else low <= value <= highest):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            if high is None and highest < value < float("inf"):
                limits += f" and at most {highest}"
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
    description = "Train or evaluate a Vision Transformer with its block linears in MXFP4."
    positive, count = number(int, 1), number(int, 0)
    amount, share = number(float, 0), number(float, 0, 1)
    parser = Parser(
        prog="main.py", description=description, epilog=EXIT_CODES, formatter_class=argparse.RawTextHelpFormatter
    )

    def recipe_option(group, flag: str, kind, text: str) -> None:
        """An option whose default depends on the data set and the model."""
        name = flag[2:].replace("-", "_")
        defaults = {"default": DEFAULTS[name] if DEFAULTS[name] is not None else "the model's own"}
        others = {f"{beginning}*": options for beginning, options in MODEL_RECIPES.items()}
        others["small data"] = SMALL_DATA
        digits = DATA_SETS["DIGITS"].options.items()
        others["DIGITS"] = {key: value for key, value in digits if SMALL_DATA.get(key) != value}
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
        help=f"measure how the weights oscillate at the end of every epoch, into {FILE_NAME}",
    )

    group = parser.add_argument_group("model")
    recipe_option(group, "--model", str, "any Vision Transformer of timm; any timm model with --quant none")
    recipe_option(group, "--drop-path", number(float, 0, 1, open_high=True), "rate of stochastic depth")
    group.add_argument("--finetune", type=Path, metavar="PATH", help="start from these weights (DeiT's or ours)")

    group = parser.add_argument_group("data")
    sets = "\n".join(f"{name}: {info.description}" for name, info in DATA_SETS.items())
    small = f"Small data below is all but {' and '.join(IN_FILES)}."
    group.add_argument("--data-set", choices=DATA_SETS, default="DIGITS", help=f"default: DIGITS\n{sets}\n{small}")
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
        "--compile", action="store_true", help="torch.compile the model, on a GPU; the first step takes a minute"
    )
    group.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="keep the inputs of the blocks alone and compute the rest again in the backward pass: less memory",
    )
    group.add_argument(
        "--cuda-graph", action="store_true", help="replay each step's forward and backward pass, on a GPU"
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
    argv = sys.argv[1:] if argv is None else argv
    for option, value in zip(argv, [*argv[1:], None]):
        if option.startswith("--") and (value == "" or option.find("=") == len(option) - 1):
            raise UserError(
                f"{option.rstrip('=')} needs a value, got an empty one; is a variable of the shell not set?"
            )
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
    check_processes(args, int(os.environ.get("WORLD_SIZE", "1")))
    if args.cuda_graph and args.device == "cpu":
        raise UserError("--cuda-graph needs a GPU, got --device cpu; drop one of them")
    if args.cuda_graph and args.checkpoint_activations:
        raise UserError(
            "--checkpoint-activations sets back the random generator, which --cuda-graph cannot record; drop one"
        )
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


def is_given(args: argparse.Namespace, name: str) -> bool:
    """Whether the option has a value, be it 0, or is switched on."""
    return getattr(args, name) is not None and getattr(args, name) is not False


def check_low_precision(args: argparse.Namespace) -> None:
    """Raises UserError for options that have nothing to act on, or that exclude one another."""
    switch = next((name for name in RECIPE_SWITCHES if getattr(args, name) is not None), None)
    answers = [name for name in OSCILLATION_ANSWERS if is_given(args, name)]
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
    if args.backward_operands is not None and args.quantizers is not None and not {"q4", "q6"} & set(args.quantizers):
        raise UserError(
            f"--backward-operands {args.backward_operands} is about q4 and q6, got --quantizers "
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
    if args.cuda_graph:
        raise UserError("--fsdp gathers weights during the passes that --cuda-graph would record; drop one of them")
    whole_weights = ("dampen", "freeze", "osci_reset", "track_oscillation", "compile")
    other = next((name for name in whole_weights if is_given(args, name)), None)
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
