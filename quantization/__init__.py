"""MXFP4 training: number formats, quantizers, the linear layer, Q-EMA, Q-Ramping and measures of oscillation.

Knows nothing of models, data sets or command lines. Imports point one way: formats -> recipe, philox -> reference,
kernels -> mx, matmul -> linear, latent -> q_ema, oscillation -> ramping.
"""

from .formats import Element, Rounding, Scaling
from .latent import confidence, histogram, latent_weight
from .linear import BLOCK_LINEARS, QuantLinear, quant_linears, set_matmul, swap_linears, weights_quantized_once
from .matmul import Matmul, has_fp8, take_lost_groups
from .mx import MXTensor, quantize_mx
from .oscillation import OSCILLATION_THRESHOLD, OscillationWindow, PathLengths, TensorPath, rate_of_change
from .q_ema import QEma, plain_rounding
from .ramping import RampingAdamW, detect_oscillation, update_periods
from .recipe import RECIPES, Quantizer, Recipe

__all__ = [
    "BLOCK_LINEARS",
    "OSCILLATION_THRESHOLD",
    "RECIPES",
    "Element",
    "MXTensor",
    "Matmul",
    "OscillationWindow",
    "PathLengths",
    "QEma",
    "QuantLinear",
    "Quantizer",
    "RampingAdamW",
    "Recipe",
    "Rounding",
    "Scaling",
    "TensorPath",
    "confidence",
    "detect_oscillation",
    "has_fp8",
    "histogram",
    "latent_weight",
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
