"""The options of main.py: one frozen dataclass for each group, with the default, range and help of each option.

`parse_args` alone reads an `argparse.Namespace`; everything after it takes `Options`. To add an option, add a field to
its group; a remedy declares its options in its own file. `option_rules.py` has the options that exclude each other. A
run that goes on from a checkpoint must have the checkpoint's value of every option, except those in `free_on_resume` of
the group.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path

import torch

from datasets import DATA_SETS, RAND_AUGMENT, SMALL_DATA, BadImages, DataSet, Preprocessing
from quantization import QUANTIZERS, RECIPES, REMEDIES, Element, Matmul, Rounding, Scaling
from quantization.option_fields import below_one, choice, option, real, share, switch, whole
from runtime.errors import UserError
from tracking.oscillation_csv import FILE_NAME
from training import checkpoint
from training.option_rules import RULES, augments_batches, downloadable
from training.weights import Weights

EXIT_CODES = """exit codes: 0 done, 1 diverged, 2 something in the command must change, 130 interrupted,
75 stopped by SIGTERM or SIGUSR1 with a checkpoint: start again with --resume auto. A second signal ends at once"""
# Defaults of models that differ from DeiT's, by the beginning of the model's name. If several match, the last one wins.
# Swin: Liu et al. 2021, appendix A2.1, and the official config.py, whose learning rates 5e-4, 5e-6 and 5e-7 all scale
# with the batch over 512: at the paper's 1,024 images they are 1e-3, 1e-5 and 1e-6, which are DeiT's.
MODEL_DEFAULTS = {
    "swin_": {
        "warmup_epochs": 20,
        "warmup_prefix": True,
        "clip_grad": 5.0,
        "drop_path": 0.2,
        "repeats": 1,
        "model_ema_decay": 0.0,
    },
    "swin_small_": {"drop_path": 0.3},
    "swin_base_": {"drop_path": 0.5},
}


def quantizer_names(text: str) -> tuple[str, ...]:
    """An argparse type: some of q1 .. q6, separated by commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in QUANTIZERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"needs some of {','.join(QUANTIZERS)}, got {unknown[0]!r}")
    return tuple(name for name in QUANTIZERS if name in names)


def with_own_default(default: object, text: str, kind: Callable[[str], object] | None, **argparse_options) -> Field:
    """An option whose default depends on the data set and on the model; `default` is that of DeiT on ImageNet."""
    return field(default=default, metadata={"help": text, "type": kind, "own_default": True, **argparse_options})


@dataclass(frozen=True)
class LowPrecisionOptions:
    """The recipe of the block linears, how they are multiplied, and what is measured of their weights."""

    title = "low precision"
    # A checkpoint's identity records all but the last two as the run's recipe. The last two may change within a run.
    free_on_resume = (
        *("quant", "quantizers", "backward_rounding", "backward_operands", "scaling"),
        *("forward_element", "backward_element", "matmul", "track_oscillation"),
    )

    quant: str = choice("none", "recipe of the block linears (default: {default})", list(RECIPES))
    quantizers: tuple[str, ...] | None = option(
        None, "quantizers of the recipe that stay on (default: all)", quantizer_names, metavar="q1,q3,..."
    )
    backward_rounding: str | None = choice(
        None, "rounding of q3 to q6 (default: the recipe's)", [Rounding.STOCHASTIC.value, Rounding.NEAREST.value]
    )
    backward_operands: str | None = choice(
        None,
        "q4 and q6 read the weights and inputs that q2 and q1 quantized, or the originals (default: the recipe's)",
        ["double", "direct"],
    )
    scaling: str | None = choice(None, "scales of all quantizers (default: the recipe's)", [s.value for s in Scaling])
    forward_element: str | None = choice(
        None, "element format of q1 and q2 (default: the recipe's)", [e.value for e in Element]
    )
    backward_element: str | None = choice(
        None, "element format of q3 to q6 (default: the recipe's)", [e.value for e in Element]
    )
    matmul: str = choice(
        Matmul.AUTO.value,
        "how quantized operands are multiplied: speed, not results (default: fp8 where the GPU has it)",
        [m.value for m in Matmul],
    )
    track_oscillation: bool = switch(f"measure how the weights oscillate at the end of every epoch, into {FILE_NAME}")


def _join_remedies() -> type:
    """One group of the options that the files of `quantization/remedies/` declare."""
    joined = [(f.name, f.type, f) for remedy in REMEDIES.values() for f in fields(remedy.options)]
    free = [name for remedy in REMEDIES.values() for name in getattr(remedy.options, "free_on_resume", ())]
    facts = {"__doc__": "The remedies for oscillation.", "title": "remedies", "free_on_resume": tuple(free)}
    return make_dataclass("RemedyOptions", joined, namespace=facts, frozen=True)


RemedyOptions = _join_remedies()


@dataclass(frozen=True)
class ModelOptions:
    """The model and the weights that it starts from."""

    title = "model"
    free_on_resume = ("model", "finetune", "pretrained", "weights")  # the identity has the model under its own key

    model: str = with_own_default(
        "deit_small_patch16_224", "any Vision Transformer of timm; any timm model with --quant none", str
    )
    drop_path: float = with_own_default(0.1, "rate of stochastic depth", below_one)
    finetune: Path | None = option(
        None, "start from these weights: ours, DeiT's, timm's, Swin's, Lightning's", Path, metavar="PATH"
    )
    pretrained: bool = switch("start from timm's weights of the model, which are fetched")
    weights: str = choice(
        Weights.MODEL.value,
        "what --eval and --finetune take from a file: the model, or its weights' moving average (default: {default})",
        [w.value for w in Weights],
    )


@dataclass(frozen=True)
class DataOptions:
    """The data set, how its images are augmented, and how they are loaded."""

    title = "data"
    # The identity has the number of classes, the input size, mean and std as used, and a fingerprint of the files.
    # `bad_images` may change: a run that has not stopped yet met no bad image, so it trained alike with both values.
    free_on_resume = ("data_path", "download", "bad_images", "num_classes", "input_size", "mean", "std", "num_workers")

    data_set: str = choice("DIGITS", lambda: _data_sets_in_words(), lambda: [d.name for d in _data_sets()])
    data_path: str | None = option(None, "directory of the data set", metavar="DIR")
    download: bool = switch(lambda: f"let torchvision fetch {', '.join(downloadable())} to --data-path")
    bad_images: str = choice(
        BadImages.STOP.value,
        "skip: train on the next image in place of a file that cannot be read (default: {default})",
        [b.value for b in BadImages],
    )
    num_classes: int | None = option(None, "refuse data with another number of classes", whole(1))
    input_size: int | None = with_own_default(None, "pixels per side of an image", whole(1))
    mean: list[float] | None = option(
        None, "mean of each channel, in [0, 1] (default: the model's own for image folders, else ImageNet's)", share,
        nargs=3, metavar=("R", "G", "B"),
    )  # fmt: skip
    std: list[float] | None = option(
        None, "standard deviation of each channel, like --mean", real(1e-6), nargs=3, metavar=("R", "G", "B")
    )
    exif_orientation: bool = switch("turn image files as their EXIF orientation says")
    num_workers: int = with_own_default(8, "loader processes for each training process", whole(0, 512))
    repeats: int = with_own_default(3, "augmented copies of an image per epoch; 1 for none", whole(1, 100))
    aa: str = with_own_default(RAND_AUGMENT, "timm's automatic augmentation, or none", str)
    color_jitter: float = with_own_default(0.3, "strength; --aa replaces it where that is on", real(0, 10))
    reprob: float = with_own_default(0.25, "probability of random erasing", share)
    augment_on: str = choice(
        "auto", "gpu: augment batches on the device that trains (default: where that is a GPU)", ["auto", "cpu", "gpu"]
    )
    keep_last_batch: bool = switch(
        "train on the images that do not fill a batch, too; Mixup leaves them as they are if they do not pair off"
    )
    mixup: float = with_own_default(0.8, "alpha of Mixup; 0 for none", real(0))
    cutmix: float = with_own_default(1.0, "alpha of CutMix; 0 for none", real(0))


@dataclass(frozen=True)
class TrainingOptions:
    """DeiT's recipe (Touvron et al. 2021, Table 9) over the paper's 90 epochs."""

    title = "training"
    free_on_resume = ()

    epochs: int = with_own_default(90, "length of the run", whole(1))
    batch_size: int = with_own_default(256, "images per step and process", whole(1))
    accumulate_steps: int = option(1, "micro-batches into which a batch is cut (default: {default})", whole(1))
    lr: float = with_own_default(5e-4, "learning rate at a global batch of 512; scaled linearly", real(0))
    min_lr: float = with_own_default(1e-5, "learning rate at the end of the cosine", real(0))
    warmup_lr: float = with_own_default(1e-6, "learning rate at the start of the warm-up", real(0))
    warmup_epochs: int = with_own_default(5, "length of the warm-up, less than --epochs", whole(0))
    warmup_prefix: bool = with_own_default(
        False, "the cosine begins after the warm-up, as Swin's does", None, action=argparse.BooleanOptionalAction
    )
    weight_decay: float = with_own_default(0.05, "not on biases, norms, tokens and position embeddings", real(0))
    clip_grad: float = with_own_default(0.0, "largest norm of all gradients together; 0 for any", real(0))
    smoothing: float = with_own_default(0.1, "label smoothing", below_one)
    model_ema_decay: float = with_own_default(0.99996, "decay of the model's moving average; 0 for none", below_one)
    seed: int = option(0, "default: {default}", whole(0, 2**31 - 1))


@dataclass(frozen=True)
class DistillationOptions:
    """Distillation from a teacher (Touvron et al. 2021, section 3)."""

    title = "distillation"
    free_on_resume = ("teacher_path",)

    distillation_type: str = choice("none", "default: {default}", ["none", "soft", "hard"])
    distillation_alpha: float = option(
        0.5, "weight of the teacher (default: {default})", share, needs="distillation_type"
    )
    distillation_tau: float = option(
        1.0, "temperature of soft (default: {default})", real(1e-6), needs="distillation_type"
    )
    teacher_model: str | None = option(None, "any timm model", needs="distillation_type")
    teacher_path: Path | None = option(None, "the teacher's weights", Path, metavar="PATH", needs="distillation_type")


@dataclass(frozen=True)
class RunOptions:
    """Where and how the program runs, and what it leaves behind."""

    title = "run"
    free_on_resume = (
        *("device", "compile", "checkpoint_activations", "cuda_graph", "fsdp", "check_ranks", "output_dir", "resume"),
        *("save_epochs", "save_steps", "keep_checkpoints", "deterministic", "eval"),
    )

    device: str = choice("auto", "default: a GPU if there is one", ["auto", "cpu", "cuda"])
    compile: bool = switch("torch.compile the model, on a GPU; the first step takes a minute")
    checkpoint_activations: bool = switch(
        "keep only the inputs of the blocks and compute the rest again in the backward pass: less memory"
    )
    cuda_graph: bool = switch("replay each step's forward and backward pass, on a GPU")
    fsdp: bool = switch("shard weights and optimizer states over torchrun's processes")
    check_ranks: int | None = option(
        None, "compare the processes every N steps (default: never)", whole(1), metavar="N"
    )
    output_dir: Path | None = option(None, "default: runs/TIME-MODEL-QUANT", Path, metavar="DIR")
    resume: str | None = option(
        None, "go on from this checkpoint; auto: the last intact one in --output-dir", metavar="PATH"
    )
    save_epochs: int = option(1, "epochs between two checkpoints (default: {default})", whole(1), metavar="N")
    save_steps: int = option(
        0, "write a checkpoint every N steps, too; 0 for none (default: {default})", whole(0), metavar="N"
    )
    keep_checkpoints: int = option(2, "the last K stay, and the best (default: {default})", whole(1), metavar="K")
    deterministic: bool = switch("on a GPU: the same bits again, if more slowly")
    eval: bool = switch("evaluate --resume or --finetune and stop")


def names_of(group: type) -> list[str]:
    return [f.name for f in fields(group)]


GROUPS = {
    "precision": LowPrecisionOptions,
    "remedies": RemedyOptions,
    "model": ModelOptions,
    "data": DataOptions,
    "training": TrainingOptions,
    "distillation": DistillationOptions,
    "run": RunOptions,
}
FIELDS: dict[str, Field] = {f.name: f for group in GROUPS.values() for f in fields(group)}
"""Every option by name."""
SAME_ON_RESUME = tuple(f.name for group in GROUPS.values() for f in fields(group) if f.name not in group.free_on_resume)
"""The options whose values a checkpoint's identity records, because a resumed run must train as its first part did."""
RECIPE_OPTIONS = (
    *(name for name in names_of(LowPrecisionOptions) if name not in ("matmul", "track_oscillation")),
    *names_of(RemedyOptions),
)
"""The options of the recipe and the remedies. If the user gives one with --eval, the checkpoint's are all ignored."""


NOT_FOR_EVALUATION = {
    *names_of(RunOptions),
    *names_of(DistillationOptions),
    *("finetune", "pretrained", "weights", "download", "num_workers", "augment_on", "matmul", "track_oscillation"),
}
"""Options whose values an evaluation does not take from a checkpoint."""


@dataclass(frozen=True)
class Options:
    """A command line with every default filled in."""

    precision: LowPrecisionOptions
    remedies: RemedyOptions
    model: ModelOptions
    data: DataOptions
    training: TrainingOptions
    distillation: DistillationOptions
    run: RunOptions
    given: frozenset[str] = frozenset()
    """Names of the options that the user gave."""
    num_processes: int = 1

    def flat(self) -> dict[str, object]:
        """Every option's value by its name."""
        return {name: getattr(getattr(self, group), name) for group in GROUPS for name in names_of(GROUPS[group])}

    def to_store(self) -> dict[str, object]:
        """What a checkpoint keeps of the options, as plain values: all that `--eval` takes as its defaults."""
        return {name: value for name, value in self.flat().items() if name not in NOT_FOR_EVALUATION}


def flag(name: str) -> str:
    """The option's name on the command line."""
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """Raises UserError for a bad argument."""

    def error(self, message: str) -> None:
        raise UserError(f"{' '.join(message.split())}; see --help")


def build_parser() -> Parser:
    """Every option's default is None here, so that `parse_args` can tell which options were given."""
    description = "Train or evaluate a Vision Transformer with its block linears in MXFP4."
    parser = Parser(
        prog="main.py", description=description, epilog=EXIT_CODES, formatter_class=argparse.RawTextHelpFormatter
    )
    for group in GROUPS.values():
        arguments = parser.add_argument_group(group.title)
        for f in fields(group):
            how = {k: v for k, v in f.metadata.items() if k not in ("needs", "own_default") and v is not None}
            how |= {k: how[k]() for k in ("help", "choices") if callable(how.get(k))}
            if f.metadata.get("own_default"):
                how["help"] += f" ({_defaults_in_words(f)})"
            arguments.add_argument(flag(f.name), default=None, **how)
    return parser


def _data_sets() -> list[DataSet]:
    """The data sets in the order of --help: those held in memory first."""
    return sorted(DATA_SETS.values(), key=lambda data_set: data_set.one_file_per_image)


def _data_sets_in_words() -> str:
    lines = ("default: DIGITS", *(f"{data_set.name}: {data_set.description}" for data_set in _data_sets()))
    large = " and ".join(data_set.name for data_set in _data_sets() if not data_set.options)
    return "\n".join((*lines, f'"small data" in the defaults below means every data set but {large}.'))


def _defaults_in_words(f: Field) -> str:
    """The default of an option that depends on the model and the data set."""
    others = {f"{beginning}*": options for beginning, options in MODEL_DEFAULTS.items()}
    others["small data"] = SMALL_DATA
    for name, info in DATA_SETS.items():
        others[name] = {key: value for key, value in info.options.items() if SMALL_DATA.get(key) != value}
    defaults = {"default": "the model's own" if f.default is None else f.default}
    defaults |= {where: options[f.name] for where, options in others.items() if f.name in options}
    return "; ".join(f"{where}: {value}" for where, value in defaults.items())


def parse_args(argv: list[str] | None = None) -> Options:
    """The options of a command line, with the defaults of the data set and of the model filled in.

    Raises UserError for an option that is unknown, out of range, or does not go with the others.
    """
    argv = sys.argv[1:] if argv is None else argv
    _refuse_empty_values(argv)
    found = vars(build_parser().parse_args(argv))
    given = {name: value for name, value in found.items() if value is not None}
    values = _filled_in(given, _of_checkpoint(given) if given.get("eval") else {})
    groups = {name: group(**{n: values[n] for n in names_of(group)}) for name, group in GROUPS.items()}
    options = Options(**groups, given=frozenset(given), num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    for rule in RULES:
        if rule.is_broken(options):
            raise UserError(rule.message(options))
    return options


def _refuse_empty_values(argv: list[str]) -> None:
    for name, value in zip(argv, [*argv[1:], None]):
        if name.startswith("--") and (value == "" or name.find("=") == len(name) - 1):
            raise UserError(f"{name.rstrip('=')} needs a value, got an empty one; is a variable of the shell not set?")


def _of_checkpoint(given: dict[str, object]) -> dict[str, object]:
    """The options of the run whose checkpoint --eval --resume evaluates; {} if there is none to be read."""
    resume, directory = given.get("resume"), given.get("output_dir")
    paths = checkpoint.find_all(directory) if resume == "auto" and directory else [Path(resume)] if resume else []
    stored = checkpoint.options_of(paths[0]) if paths and paths[0].is_file() else {}
    if "recipe" in stored:  # an identity, which has the settings under its own keys
        stored = {name: stored[flag(name)] for name in SAME_ON_RESUME if flag(name) in stored} | _of_identity(stored)
    if given.keys() & set(RECIPE_OPTIONS):
        stored = {name: value for name, value in stored.items() if name not in RECIPE_OPTIONS}
    if "data_set" in given:
        stored.pop("data_path", None)
    return {name: value for name, value in stored.items() if name in FIELDS and name not in NOT_FOR_EVALUATION}


def _of_identity(identity: dict[str, object]) -> dict[str, object]:
    """The model, its input size and, if it has a name, its recipe."""
    found = {"model": identity["model"], "input_size": identity["input size"]}
    found |= {name: list(identity.get(name, getattr(Preprocessing(), name))) for name in ("mean", "std")}
    name, _, beta = str(identity["recipe"]).partition(", q_ema_beta=")
    for quant, recipe in RECIPES.items():
        if recipe.describe() == name:
            return found | {"quant": quant, "q_ema": bool(beta)} | ({"q_ema_beta": float(beta)} if beta else {})
    return found


def _filled_in(given: dict[str, object], stored: dict[str, object]) -> dict[str, object]:
    """Every option's value: the user's, else that in `stored`, else the data set's, the model's or the field's default.

    Raises UserError for an option without the one that it needs.
    """
    chosen = stored | given
    of_data_set = DATA_SETS[chosen.get("data_set", FIELDS["data_set"].default)].options
    own = defaults_of(chosen.get("model") or of_data_set.get("model", FIELDS["model"].default)) | of_data_set
    if "model" in chosen:
        own["input_size"] = None  # the data set's size goes with the data set's model
    values = {name: f.default for name, f in FIELDS.items()} | own | chosen
    for name, f in FIELDS.items():
        needs = f.metadata.get("needs")
        if needs is not None and not _is_on(values[needs]):
            if name in given:
                raise UserError(f"{flag(name)} {values[name]} has no effect without {flag(needs)}; add it")
            if "None" in f.type:
                values[name] = None
    if "warmup_epochs" not in chosen:
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] - 1)
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if values["augment_on"] == "auto":
        can = augments_batches(values["data_set"], values["aa"])
        values["augment_on"] = "gpu" if values["device"] == "cuda" and can else "cpu"
    return values


def _is_on(value: object) -> bool:
    """Return True if an option that others need is on. A number counts as on, even 0."""
    return value is not None and value is not False and value != "none"


def defaults_of(model: str) -> dict[str, object]:
    """A model's defaults on ImageNet of the options that have more than one default."""
    defaults = {name: f.default for name, f in FIELDS.items() if f.metadata.get("own_default")}
    for beginning, options in MODEL_DEFAULTS.items():
        if model.startswith(beginning):
            defaults |= options
    return defaults
