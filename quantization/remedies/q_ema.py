"""Q-EMA rounds the weight of the forward pass towards its moving average (paper section 5, Algorithm 1).

The average damps the noise of single updates, so a weight near a rounding threshold stays on one side of it.
The rounding itself is `Rounding.EMA` in the quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..averages import lerp_unless
from ..optim.step_count import count_steps
from ..option_fields import below_one, option, switch
from ..recipe import PAPER_BETA, Recipe
from ..shards import local
from ..swap import quant_linears
from .base import Remedy, RunLength, remedy


@dataclass(frozen=True)
class QEmaOptions:
    # A checkpoint's identity has both as a part of its recipe.
    free_on_resume = ("q_ema", "q_ema_beta")

    q_ema: bool = switch("round weights towards their moving average")
    q_ema_beta: float = option(PAPER_BETA, "decay of that average (default: {default})", below_one, needs="q_ema")


@remedy("q_ema", QEmaOptions)
class QEma(Remedy):
    """Advances the moving averages of a model's weights: W_ema <- beta W_ema + (1 - beta) W after every update of W.

    `model` is attached at once if it is given. `beta` enters the recipe by `change_recipe`; a model that exists has its
    own in the recipe of each layer.
    """

    goes_with = ("q_ramping",)
    in_evaluation = True

    def __init__(self, model: nn.Module | None = None, beta: float = PAPER_BETA) -> None:
        self.beta = beta
        if model is not None:
            self.attach(model)

    @classmethod
    def from_options(cls, options: QEmaOptions, length: RunLength) -> QEma:
        return cls(beta=options.q_ema_beta)

    def change_recipe(self, recipe: Recipe) -> Recipe:
        return recipe.with_q_ema(self.beta)

    def attach(self, model: nn.Module) -> None:
        """Start an average that was never advanced at the present weight.

        The weight may have changed since the layer was made (initialisation, a loaded checkpoint). Raises ValueError
        for a model without Q-EMA layers, and for averages in half precision, which a step of (1 - beta) would not move.
        """
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
    def after_step(self, skip: Tensor | None = None) -> None:
        shares = [1 - layer.recipe.q_ema_beta for layer in self.layers]
        averages = [local(layer.weight_ema) for layer in self.layers]
        weights = [local(layer.weight) for layer in self.layers]
        if len(set(shares)) == 1:
            lerp_unless(skip, averages, weights, shares[0])
        else:
            for average, weight, share in zip(averages, weights, shares):
                lerp_unless(skip, [average], [weight], share)
        count_steps([layer.ema_updates for layer in self.layers], skip)
