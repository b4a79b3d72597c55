"""MXFP4 training: number formats, quantizers, the linear layer, Q-EMA, Q-Ramping and measures of oscillation.

Knows nothing of models, data sets or command lines. Imports point one way: formats -> recipe, philox -> reference,
kernels -> mx, matmul -> linear -> q_ema, oscillation -> ramping.
"""

from .formats import Element, Rounding, Scaling
from .linear import BLOCK_LINEARS, QuantLinear, quant_linears, set_matmul, swap_linears, weights_quantized_once
from .matmul import Matmul, has_fp8, take_lost_groups
from .mx import MXTensor, quantize_mx
from .oscillation import OSCILLATION_THRESHOLD, PathLengths
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
    "PathLengths",
    "QEma",
    "QuantLinear",
    "Quantizer",
    "RampingAdamW",
    "Recipe",
    "Rounding",
    "Scaling",
    "detect_oscillation",
    "has_fp8",
    "plain_rounding",
    "quant_linears",
    "quantize_mx",
    "set_matmul",
    "swap_linears",
    "take_lost_groups",
    "update_periods",
    "weights_quantized_once",
]
