"""MXFP4 training: number formats, quantizers, the linear layer, measures of oscillation, remedies, and INT4.

This package knows nothing of data sets, parses no command line but that of `export/`, and knows of models only what
`families/` says. A file imports only from files that are listed before it, and the same holds for the folders:

    shared_name             one set of modules for the names `quantization` and `tetrajet`
    formats, recipe         number formats; the choice of quantizers for a layer
    option_fields           how options of main.py are declared
    philox, reference       random bits; the specification of MX quantization, in PyTorch
    adamw_update, triton/   the data of an optimizer step; the kernels of quantizers, optimizer and averages
    operators               the quantizers for torch.compile
    mx, mx_file             `quantize_mx` and `MXTensor`; MX tensors in a safetensors file
    matmul, shards          the matmul of two operands; sharded weights
    averages                moving averages that skip what a step skips
    baselines/              the INT4 layer
    linear                  the MX layer
    families/               the block linears of known models; modules that compute around their linears
    swap, weight_cache      functions on whole models: swap layers in, find them, quantize weights once
    coverage, create        which linears a forward pass really quantizes; quantized models of timm
    measures/               latent weights; path lengths and oscillation ratios
    optim/                  counts of steps; Q-Ramping's optimizer and detection
    remedies/               what a remedy for oscillation is; one file for each of them
    export/                 trained models in the formats of other libraries, and `load`
"""

from .averages import lerp_unless
from .baselines.int4 import Int4Linear, initialise_steps
from .coverage import Coverage, Status, coverage
from .create import create_model
from .export.load import load
from .export.writing import export_model
from .formats import Element, Rounding, Scaling
from .linear import QuantLinear
from .matmul import Matmul, has_fp8, take_lost_groups
from .measures.latent import confidence, histogram, latent_weight
from .measures.oscillation import (
    OSCILLATION_THRESHOLD,
    OscillationWindow,
    PathLengths,
    TensorPath,
    oscillates,
    rate_of_change,
)
from .mx import MXTensor, quantize_mx
from .mx_file import load_mx, save_mx
from .optim.ramping import RampingAdamW, detect_oscillation, update_periods
from .recipe import BACKWARD, FORWARD, QUANTIZERS, RECIPES, Int4Recipe, Quantizer, Recipe
from .remedies.base import REMEDIES, Remedies, Remedy, RunLength
from .remedies.dampen import Dampen, Reduction
from .remedies.freeze import Freeze
from .remedies.heal import Heal
from .remedies.keep_blocks import KeepBlocks
from .remedies.osci_reset import OsciReset
from .remedies.q_ema import QEma
from .remedies.q_ramping import QRamping
from .shared_name import share_modules
from .swap import (
    BLOCK_LINEARS,
    copy_precision,
    plain_rounding,
    quant_linears,
    restore_linears,
    set_matmul,
    swap_linears,
    uses_fp8,
)
from .weight_cache import weights_quantized_once

share_modules(__name__)

__all__ = [
    "BACKWARD",
    "BLOCK_LINEARS",
    "Coverage",
    "Dampen",
    "Element",
    "FORWARD",
    "Freeze",
    "Heal",
    "Int4Linear",
    "Int4Recipe",
    "KeepBlocks",
    "MXTensor",
    "Matmul",
    "OSCILLATION_THRESHOLD",
    "OsciReset",
    "OscillationWindow",
    "PathLengths",
    "QEma",
    "QRamping",
    "QUANTIZERS",
    "QuantLinear",
    "Quantizer",
    "RECIPES",
    "REMEDIES",
    "RampingAdamW",
    "Recipe",
    "Reduction",
    "Remedies",
    "Remedy",
    "Rounding",
    "RunLength",
    "Scaling",
    "Status",
    "TensorPath",
    "confidence",
    "coverage",
    "copy_precision",
    "create_model",
    "detect_oscillation",
    "export_model",
    "has_fp8",
    "histogram",
    "initialise_steps",
    "latent_weight",
    "lerp_unless",
    "load",
    "load_mx",
    "oscillates",
    "plain_rounding",
    "quant_linears",
    "quantize_mx",
    "rate_of_change",
    "restore_linears",
    "save_mx",
    "set_matmul",
    "swap_linears",
    "take_lost_groups",
    "update_periods",
    "uses_fp8",
    "weights_quantized_once",
]
