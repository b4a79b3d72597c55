"""The functions of `reference.py` in Triton, bit for bit: the backend of tensors on a GPU.

A program reads a tile once and writes whatever was asked for: values, packed codes, scales. No noise tensor exists;
the random bits are computed in registers.
"""

from .amax import largest_magnitude
from .columns import quantize_both
from .rows import dequantize, quantize

__all__ = ["dequantize", "largest_magnitude", "quantize", "quantize_both"]
