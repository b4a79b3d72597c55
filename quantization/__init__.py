"""MXFP4 training: number formats, quantizers, the linear layer, measures of oscillation, remedies, and INT4.

This package knows nothing of data sets or command lines, and of models only what `families/` says. A file imports only
from files that are listed before it, and the same holds for the folders:

    formats, recipe         number formats; the choice of quantizers for a layer
    philox, reference       random bits; the specification of MX quantization, in PyTorch
    adamw_update, triton/   the data of an optimizer step; the kernels of quantizers, optimizer and averages
    operators               the quantizers for torch.compile
    mx, matmul, shards      `quantize_mx`; the matmul of two operands; sharded weights
    baselines/              the INT4 layer
    linear                  the MX layer
    families/               the block linears of known models; modules that compute around their linears
    swap, weight_cache      functions on whole models: swap layers in, find them, quantize weights once
    coverage, create        which linears a forward pass really quantizes; quantized models of timm
    measures/               latent weights; path lengths and oscillation ratios
    optim/                  counts of steps; Q-Ramping
    remedies/               Q-EMA, dampening, freezing, OsciReset
"""

from .baselines.int4 import Int4Linear, initialise_steps
from .coverage import Coverage, Status, coverage
from .create import create_model
from .formats import Element, Rounding, Scaling
from .linear import QuantLinear
from .matmul import Matmul, has_fp8, take_lost_groups
from .measures.latent import confidence, histogram, latent_weight
from .measures.oscillation import OSCILLATION_THRESHOLD, OscillationWindow, PathLengths, TensorPath, rate_of_change
from .mx import MXTensor, quantize_mx
from .optim.ramping import RampingAdamW, detect_oscillation, update_periods
from .recipe import BACKWARD, FORWARD, QUANTIZERS, RECIPES, Int4Recipe, Quantizer, Recipe
from .remedies.dampen import Dampen, Reduction
from .remedies.freeze import Freeze
from .remedies.osci_reset import OsciReset
from .remedies.q_ema import QEma, lerp_unless
from .swap import BLOCK_LINEARS, plain_rounding, quant_linears, set_matmul, swap_linears
from .weight_cache import weights_quantized_once

__all__ = [
    "BACKWARD",
    "BLOCK_LINEARS",
    "Coverage",
    "FORWARD",
    "OSCILLATION_THRESHOLD",
    "QUANTIZERS",
    "RECIPES",
    "Dampen",
    "Element",
    "Freeze",
    "Int4Linear",
    "Int4Recipe",
    "MXTensor",
    "Matmul",
    "OsciReset",
    "OscillationWindow",
    "PathLengths",
    "QEma",
    "QuantLinear",
    "Quantizer",
    "RampingAdamW",
    "Recipe",
    "Reduction",
    "Rounding",
    "Scaling",
    "Status",
    "TensorPath",
    "confidence",
    "coverage",
    "create_model",
    "detect_oscillation",
    "has_fp8",
    "histogram",
    "initialise_steps",
    "latent_weight",
    "lerp_unless",
    "plain_rounding",
    "quant_linears",
    "quantize_mx",
    "rate_of_change",
    "set_matmul",
    "swap_linears",
    "take_lost_groups",
    "update_periods",
    "weights_quantized_once",
]
