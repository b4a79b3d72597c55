"""The options that exclude each other: a table of rules, in the order in which they are checked.

A rule is a predicate that is true where the options break it, and the message that the user gets then: the rule, what
was received, and the remedy. An option that only needs another one says so in its field (`options.option`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import torch

from datasets import DATA_SETS
from quantization import BACKWARD, FORWARD, REMEDIES, has_fp8
from quantization.remedies.base import go_together

if TYPE_CHECKING:
    from training.options import Options

RECIPE_SWITCHES = (
    *("quantizers", "backward_rounding", "backward_operands", "scaling", "forward_element", "backward_element"),
)
WITHOUT_SHARDING = (
    *(name for name, remedy in REMEDIES.items() if not remedy.can_shard),
    *("track_oscillation", "compile"),
)
"""Options that need whole weights."""


class Rule(NamedTuple):
    is_broken: Callable[[Options], bool]
    message: Callable[[Options], str]


def downloadable() -> list[str]:
    return [name for name, data_set in DATA_SETS.items() if data_set.can_download]


def augments_batches(data_set: str, aa: str) -> bool:
    """Return True if --augment-on gpu can do what the data set and --aa ask for."""
    return DATA_SETS[data_set].has_pixels and not aa.startswith("augmix")


def _in_files() -> list[str]:
    return [name for name, data_set in DATA_SETS.items() if data_set.one_file_per_image]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _first_given(o: Options, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in o.given), None)


def _remedies(o: Options) -> list[str]:
    return [name for name in REMEDIES if name in o.given]


def _apart(o: Options) -> tuple[str, str] | None:
    """The first two remedies that do not go together."""
    return next((pair for pair in combinations(_remedies(o), 2) if not go_together(*pair)), None)


def _acting_on_q2(o: Options) -> list[str]:
    return [name for name in _remedies(o) if REMEDIES[name].needs_q2]


def _has_mx_recipe(o: Options) -> bool:
    return o.precision.quant not in ("none", "int4")


def _lacks(o: Options, names: tuple[str, ...]) -> bool:
    """Return True if `--quantizers` switches off all quantizers of these names."""
    return o.precision.quantizers is not None and not set(names) & set(o.precision.quantizers)


def _quantizers(o: Options) -> str:
    return f"--quantizers {','.join(o.precision.quantizers)}"


def _element_without_quantizer(option: str, names: tuple[str, ...]) -> Rule:
    return Rule(
        lambda o: option in o.given and _lacks(o, names),
        lambda o: f"{_flag(option)} is about {','.join(names)}, got {_quantizers(o)}; add one of them",
    )


def _for_several_processes(option: str) -> Rule:
    return Rule(
        lambda o: option in o.given and o.num_processes == 1,
        lambda o: f"{_flag(option)} is for several processes, got one; start main.py by torchrun or drop it",
    )


PRECISION_RULES = (
    Rule(
        lambda o: not _has_mx_recipe(o) and _first_given(o, RECIPE_SWITCHES) is not None,
        lambda o: (
            f"{_flag(_first_given(o, RECIPE_SWITCHES))} changes an MXFP4 recipe, "
            f"got --quant {o.precision.quant}; add --quant mxfp4"
        ),
    ),
    Rule(
        lambda o: not _has_mx_recipe(o) and bool(_remedies(o)),
        lambda o: (
            f"{_flag(_remedies(o)[0])} needs quantized weights, got --quant {o.precision.quant}; add --quant mxfp4"
        ),
    ),
    Rule(
        lambda o: _apart(o) is not None,
        lambda o: (
            f"{_flag(_apart(o)[0])} and {_flag(_apart(o)[1])} are two remedies for oscillation that "
            "no paper combines; drop one"
        ),
    ),
    Rule(
        lambda o: bool(_acting_on_q2(o)) and _lacks(o, ("q2",)),
        lambda o: f"{_flag(_acting_on_q2(o)[0])} is about weights that q2 quantizes, got {_quantizers(o)}; add q2",
    ),
    _element_without_quantizer("forward_element", FORWARD),
    _element_without_quantizer("backward_rounding", BACKWARD),
    _element_without_quantizer("backward_element", BACKWARD),
    Rule(
        lambda o: "backward_operands" in o.given and _lacks(o, ("q4", "q6")),
        lambda o: (
            f"--backward-operands {o.precision.backward_operands} is about q4 and q6, got {_quantizers(o)}; "
            "add one of them"
        ),
    ),
)
DATA_RULES = (
    Rule(
        lambda o: not o.run.eval and o.data.mixup + o.data.cutmix > 0 and o.training.batch_size % 2 > 0,
        lambda o: f"Mixup and CutMix pair images, so --batch-size must be even, got {o.training.batch_size}",
    ),
    Rule(
        lambda o: not o.run.eval and o.training.batch_size % o.training.accumulate_steps > 0,
        lambda o: (
            f"--accumulate-steps must divide --batch-size, got {o.training.accumulate_steps} for "
            f"{o.training.batch_size}; change one of them"
        ),
    ),
    Rule(
        lambda o: o.data.download and not DATA_SETS[o.data.data_set].can_download,
        lambda o: f"--download fetches {', '.join(downloadable())}, got --data-set {o.data.data_set}; drop it",
    ),
    Rule(
        lambda o: o.data.data_path is not None and not DATA_SETS[o.data.data_set].needs_path,
        lambda o: f"--data-path has no effect on --data-set {o.data.data_set}, which needs no files; drop it",
    ),
    Rule(
        lambda o: o.data.augment_on == "gpu" and not augments_batches(o.data.data_set, o.data.aa),
        lambda o: (
            f"--augment-on gpu augments batches, which --data-set {o.data.data_set} with --aa {o.data.aa} "
            "cannot have; pass --augment-on cpu"
        ),
    ),
    Rule(
        lambda o: o.data.exif_orientation and not DATA_SETS[o.data.data_set].one_file_per_image,
        lambda o: (
            f"--exif-orientation is about image files ({', '.join(_in_files())}), "
            f"got --data-set {o.data.data_set}; drop it"
        ),
    ),
    Rule(
        lambda o: o.data.bad_images == "skip" and not DATA_SETS[o.data.data_set].one_file_per_image,
        lambda o: (
            f"--bad-images skip is about image files ({', '.join(_in_files())}), "
            f"got --data-set {o.data.data_set}; drop it"
        ),
    ),
)
TRAINING_RULES = (
    Rule(
        lambda o: not o.run.eval and o.training.warmup_epochs >= o.training.epochs,
        lambda o: (
            f"--warmup-epochs must be less than --epochs {o.training.epochs}, got {o.training.warmup_epochs}: "
            "--lr would never be reached; lower it"
        ),
    ),
)
DISTILLATION_RULES = (
    Rule(
        lambda o: o.distillation.distillation_type == "hard" and "distillation_tau" in o.given,
        lambda o: (
            f"--distillation-tau {o.distillation.distillation_tau} is the temperature of "
            "--distillation-type soft, got hard; drop it"
        ),
    ),
    Rule(
        lambda o: (
            o.distillation.distillation_type != "none"
            and (o.distillation.teacher_model is None or o.distillation.teacher_path is None)
        ),
        lambda o: f"--distillation-type {o.distillation.distillation_type} needs --teacher-model and --teacher-path",
    ),
)
RUN_RULES = (
    Rule(
        lambda o: o.run.resume is not None and o.model.finetune is not None,
        lambda o: "--resume goes on with a run and --finetune starts one; give one of them",
    ),
    Rule(
        lambda o: o.run.resume == "auto" and o.run.output_dir is None,
        lambda o: "--resume auto looks into --output-dir; give one",
    ),
    Rule(
        lambda o: o.run.eval and o.run.resume is None and o.model.finetune is None and not o.model.pretrained,
        lambda o: "--eval needs weights; give --resume, --finetune or --pretrained",
    ),
    Rule(
        lambda o: o.model.pretrained and (o.model.finetune is not None or o.run.eval and o.run.resume is not None),
        lambda o: "--pretrained and a file are two sources of weights; give one of them",
    ),
    Rule(
        lambda o: "weights" in o.given and o.model.finetune is None and not (o.run.eval and o.run.resume),
        lambda o: f"--weights {o.model.weights} chooses from the file of --finetune or of --eval --resume; give one",
    ),
    Rule(
        lambda o: o.run.eval and o.precision.track_oscillation,
        lambda o: "--track-oscillation measures training, got --eval; leave one of them out",
    ),
    Rule(
        lambda o: o.run.device == "cuda" and not torch.cuda.is_available(),
        lambda o: "--device cuda needs a GPU that PyTorch can use, found none; use --device cpu or auto",
    ),
    _for_several_processes("fsdp"),
    _for_several_processes("check_ranks"),
    Rule(
        lambda o: o.run.check_ranks is not None and o.run.eval,
        lambda o: "--check-ranks compares processes that train, got --eval; leave one of them out",
    ),
    Rule(
        lambda o: o.run.fsdp and o.run.cuda_graph,
        lambda o: "--fsdp gathers weights during the passes that --cuda-graph would record; drop one of them",
    ),
    Rule(
        lambda o: o.run.fsdp and _first_given(o, WITHOUT_SHARDING) is not None,
        lambda o: (
            f"--fsdp shards the weights, and {_flag(_first_given(o, WITHOUT_SHARDING))} needs whole ones; "
            "drop one of them"
        ),
    ),
    Rule(
        lambda o: o.run.fsdp and o.precision.quant == "int4",
        lambda o: "--fsdp shards the weights, and --quant int4 needs whole ones; drop one of them",
    ),
    Rule(
        lambda o: o.run.cuda_graph and o.run.device == "cpu",
        lambda o: "--cuda-graph needs a GPU, got --device cpu; drop one of them",
    ),
    Rule(
        lambda o: o.run.cuda_graph and o.run.checkpoint_activations,
        lambda o: "--checkpoint-activations sets back the random generator, which --cuda-graph cannot record; drop one",
    ),
    Rule(
        lambda o: o.precision.matmul != "auto" and not _has_mx_recipe(o),
        lambda o: (
            f"--matmul {o.precision.matmul} multiplies quantized operands, got --quant {o.precision.quant}; "
            "add --quant mxfp4"
        ),
    ),
    Rule(
        lambda o: o.precision.matmul == "fp8" and not has_fp8(torch.device(o.run.device)),
        lambda o: (
            "--matmul fp8 needs a GPU with FP8 tensor cores (compute capability 8.9 or later), "
            f"got {torch.cuda.get_device_name() if o.run.device == 'cuda' else o.run.device}; use auto or bf16"
        ),
    ),
)
RULES = (*PRECISION_RULES, *DATA_RULES, *TRAINING_RULES, *DISTILLATION_RULES, *RUN_RULES)
