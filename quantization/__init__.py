"""MXFP4 training: number formats, quantizers, the linear layer, measures of oscillation and what answers it; INT4.

Knows nothing of models, data sets or command lines. Imports point one way: formats -> recipe, philox -> reference,
kernels -> operators -> mx, matmul, shards, step_count -> int4 -> linear, latent -> q_ema, oscillation -> dampen,
freeze, ramping, osci_reset.
"""

from .baselines.int4 import Int4Linear, initialise_steps
from .formats import Element, Rounding, Scaling
from .linear import BLOCK_LINEARS, QuantLinear, quant_linears, set_matmul, swap_linears, weights_quantized_once
from .matmul import Matmul, has_fp8, take_lost_groups
from .measures.latent import confidence, histogram, latent_weight
from .measures.oscillation import OSCILLATION_THRESHOLD, OscillationWindow, PathLengths, TensorPath, rate_of_change
from .mx import MXTensor, quantize_mx
from .optim.ramping import RampingAdamW, detect_oscillation, update_periods
from .recipe import BACKWARD, FORWARD, QUANTIZERS, RECIPES, Int4Recipe, Quantizer, Recipe
from .remedies.dampen import Dampen, Reduction
from .remedies.freeze import Freeze
from .remedies.osci_reset import OsciReset
from .remedies.q_ema import QEma, lerp_unless, plain_rounding

__all__ = [
    "BACKWARD",
    "BLOCK_LINEARS",
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
    "TensorPath",
    "confidence",
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
