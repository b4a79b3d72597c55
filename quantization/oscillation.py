"""Measures of weight oscillation (paper sections 4 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import quant_linears

OSCILLATION_THRESHOLD = 16  # a weight oscillates if its ratio exceeds this (paper section 6)


class PathLengths:
    """Path lengths of every quantized weight W and of Q2(W), element by element, over the steps between `record`s.

    The oscillation ratio R_w = sum |q_t - q_(t-1)| / sum |w_t - w_(t-1)| of an element that crosses a rounding
    threshold back and forth is large: its latent weight hardly moves, its quantized weight jumps a whole step.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        """The present weights are where the paths start."""
        self._layers = list(quant_linears(model).values())
        self._weights = [layer.weight.detach().float().clone() for layer in self._layers]
        self._quantized = [layer.quantized_weight() for layer in self._layers]
        self._weight_paths = [torch.zeros_like(w) for w in self._weights]
        self._quantized_paths = [torch.zeros_like(w) for w in self._weights]

    @torch.no_grad()
    def record(self) -> None:
        """Add the way from the weights of the last call to the present ones."""
        for i, layer in enumerate(self._layers):
            weight, quantized = layer.weight.detach().float(), layer.quantized_weight()
            self._weight_paths[i] += (weight - self._weights[i]).abs_()
            self._quantized_paths[i] += (quantized - self._quantized[i]).abs_()
            self._weights[i].copy_(weight)
            self._quantized[i] = quantized

    def ratios(self) -> dict[nn.Parameter, Tensor]:
        """R_w of every element by weight, fp32 in the weight's shape; 0 where the weight did not move."""
        return {
            layer.weight: torch.where(path > 0, quantized_path / path, 0)
            for layer, path, quantized_path in zip(self._layers, self._weight_paths, self._quantized_paths)
        }

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Where the paths are and how long they were, so that the recording can go on elsewhere."""
        return {
            "weights": self._weights,
            "quantized": self._quantized,
            "weight_paths": self._weight_paths,
            "quantized_paths": self._quantized_paths,
        }

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for name, own in self.state_dict().items():
            own[:] = [saved.to(tensor.device, copy=True) for tensor, saved in zip(own, state[name], strict=True)]
