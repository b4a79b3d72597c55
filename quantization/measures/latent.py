"""Positions of single weights between the thresholds of their quantizer (paper section 4 and appendix A).

The latent weight is w/S: the master weight over the scale of its group. Its quantization confidence is small near a
decision threshold of nearest rounding, where a small update flips the quantized weight. This file looks at the weights
of one moment; `oscillation.py` follows them over steps.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..formats import GROUP_SIZE, Element
from ..mx import quantize_mx
from ..recipe import Quantizer


def group_scales(weight_CD: Tensor, quantizer: Quantizer) -> Tensor:
    """S of every element's group of 32 along D, fp32 [C, D]."""
    t = quantize_mx(weight_CD, axis=-1, element=quantizer.element, scaling=quantizer.scaling)
    return t.scales.to(torch.float32).repeat_interleave(GROUP_SIZE, dim=-1)[:, : weight_CD.shape[1]]


def latent_weight(weight_CD: Tensor, quantizer: Quantizer) -> Tensor:
    """w/S, fp32 [C, D]. |w/S| is at most Qp with truncation-free scaling, below 2^(Emax + 1) with floor scaling."""
    return weight_CD.detach().float() / group_scales(weight_CD, quantizer)


def confidence(latent: Tensor, element: Element | str) -> Tensor:
    """Distance of each w/S to the nearest decision threshold, over the largest distance in its cell: in [0, 1].

    The cells are those of nearest rounding. The outermost one ends at Qp; values that floor scaling leaves beyond it
    saturate and count as 1. The result has the shape of `latent`.
    """
    fmt = Element(element).format
    thresholds = fmt.thresholds
    farthest = (thresholds[0], *((high - low) / 2 for low, high in pairwise(thresholds)), fmt.max - thresholds[-1])
    # The cell of zero extends to the negative side, so its lower threshold is never the nearer one.
    low, high, farthest = (
        latent.new_tensor(bounds) for bounds in ((-torch.inf, *thresholds), (*thresholds, torch.inf), farthest)
    )
    magnitude = latent.abs()
    cell = torch.bucketize(magnitude, high[:-1])
    return (torch.minimum(magnitude - low[cell], high[cell] - magnitude) / farthest[cell]).clamp_(max=1)


def histogram(values: Tensor, low: float, width: float, bins: int) -> Tensor:
    """The number of values in each bin [low + i width, low + (i + 1) width), int64 [bins].

    Values outside count in the first or last bin; NaN and Inf count in none. `low` must be a multiple of `width`; if
    that is a power of two, no value lands in a neighbour's bin.
    """
    finite = values[values.isfinite()]
    index = (finite / width).floor().long() - round(low / width)
    return torch.bincount(index.clamp_(0, bins - 1), minlength=bins)
