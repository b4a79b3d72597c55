"""Q-EMA rounds the weight of the forward pass towards its moving average (paper section 5, Algorithm 1).

The average damps the noise of single updates, so a weight near a rounding threshold stays on one side of it.
The rounding itself is `Rounding.EMA` in the quantizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..operators import HAS_TRITON
from ..optim.step_count import count_steps
from ..shards import local
from ..swap import quant_linears

if HAS_TRITON:
    from ..triton import lerp as lerp_kernel
    from ..triton import multi_tensor
else:
    lerp_kernel = None


class QEma:
    """Advances the moving averages of a model's weights: W_ema <- beta W_ema + (1 - beta) W after every update of W.

    An average that was never advanced starts at the present weight, even if the weight has changed since the layer was
    made (initialisation, a loaded checkpoint). Raises ValueError for a model without Q-EMA layers, and for averages in
    half precision, which a step of (1 - beta) would not move.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [layer for layer in quant_linears(model).values() if layer.recipe.q_ema_beta is not None]
        if not self.layers:
            raise ValueError("the model has no Q-EMA layer; build it with a recipe whose q_ema_beta is set")
        for layer in self.layers:
            if layer.weight_ema.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"Q-EMA needs averages in fp32, got weight_ema in {layer.weight_ema.dtype}; convert it"
                )
            if layer.ema_updates == 0:
                layer.reset_ema()

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Call once after every optimizer step. If `skip` is 1, neither averages nor counters change."""
        shares = [1 - layer.recipe.q_ema_beta for layer in self.layers]
        averages = [local(layer.weight_ema) for layer in self.layers]
        weights = [local(layer.weight) for layer in self.layers]
        if len(set(shares)) == 1:
            lerp_unless(skip, averages, weights, shares[0])
        else:
            for average, weight, share in zip(averages, weights, shares):
                lerp_unless(skip, [average], [weight], share)
        count_steps([layer.ema_updates for layer in self.layers], skip)


def lerp_unless(skip: Tensor | None, averages: list[Tensor], targets: list[Tensor], weight: float) -> None:
    """averages += weight (targets - averages), in place; nothing changes if `skip`, an fp32 scalar of 0 or 1, is 1.

    `skip` may be on the device; the host does not read it. Every operation rounds once, so the bits are the same on
    every processor; those of `torch.lerp` are not, because some processors fuse its multiplication with its addition.
    """
    alike = [t.shape for t in averages] == [t.shape for t in targets]
    tensors = [*averages, *targets] if skip is None else [skip, *averages, *targets]
    if alike and lerp_kernel is not None and multi_tensor.fits(tensors):
        lerp_kernel.step(averages, targets, weight, skip)
        return
    for average, target in zip(averages, targets):
        if weight < 0.5:
            new = average + (target - average) * weight
        else:  # with a weight of 1, the average becomes exactly the target
            new = target + (average - target) * (1 - weight)
        average.copy_(new if skip is None else torch.where(skip > 0, average, new))
