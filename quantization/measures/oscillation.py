"""Measures how weights move over training steps, before and after their quantizer (paper sections 4 and 6).

This file computes paths, rates of change and oscillation ratios from weights. `tracking/tracker.py` calls it in a
training run with `--track-oscillation`, and `tracking/oscillation_csv.py` reads and writes the file of its results;
Q-Ramping and OsciReset use the ratios to decide.

Q2(W) is `layer.quantized_weight()`, the weight that the forward pass uses at that moment, Q-EMA included. Q-Ramping's
detection studies plain rounding, so it measures within `plain_rounding(model)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..formats import Rounding
from ..linear import QuantLinear
from ..shards import local
from ..swap import quant_linears
from .latent import group_scales

OSCILLATION_THRESHOLD = 16  # a weight oscillates if its ratio exceeds this (paper section 6)


def rate_of_change(before: Tensor, after: Tensor) -> Tensor:
    """||after - before||_F / ||before||_F (paper section 4), a scalar; 0 if nothing moved, else Inf if before is 0."""
    distance = torch.linalg.vector_norm(after - before)
    return torch.where(distance == 0, 0, distance / torch.linalg.vector_norm(before))


def oscillation_ratio(weight_path: Tensor, quantized_path: Tensor) -> Tensor:
    """R_w of every element, from the path lengths of w and of Q2(w); 0 if the weight did not move."""
    return torch.where(weight_path > 0, quantized_path / weight_path, 0)


def oscillates(ratio: Tensor) -> Tensor:
    """Bool, True for each weight that oscillates: its ratio R_w exceeds 16 (paper section 6)."""
    return ratio > OSCILLATION_THRESHOLD


class PathLength:
    """Path length per element: the sum of |x_t - x_(t-1)| over the steps since `start`, in fp32."""

    def __init__(self, start: Tensor) -> None:
        self.last = start.detach().to(torch.float32, copy=True)
        self.length = torch.zeros_like(self.last)

    @torch.no_grad()
    def add(self, position: Tensor) -> None:
        self.length += (position - self.last).abs_()
        self.last.copy_(position)


class TensorPath(PathLength):
    """Path length per element, and the mean rate of change of the tensor as a whole."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start)
        self.steps = 0
        self._rates = torch.zeros((), device=start.device)

    @torch.no_grad()
    def add(self, position: Tensor) -> None:
        self._rates += rate_of_change(self.last, position)
        super().add(position)
        self.steps += 1

    def rate_of_change(self) -> Tensor:
        """r(X), the mean of `rate_of_change` over the steps; NaN without any."""
        return self._rates / self.steps

    def state_dict(self) -> dict:
        """The path so far, so that another object can continue it."""
        return {"last": self.last, "length": self.length, "rates": self._rates, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.last.copy_(state["last"])
        self.length.copy_(state["length"])
        self._rates.copy_(state["rates"])
        self.steps = state["steps"]


class PathLengths:
    """Path lengths of every quantized weight W and of Q2(W), per element; `record` adds one step.

    The oscillation ratio R_w = sum |q_t - q_(t-1)| / sum |w_t - w_(t-1)| is large for an element that crosses a
    rounding threshold back and forth: its latent weight hardly moves, but its quantized weight jumps a whole step.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start the paths at the present weights."""
        self._layers = list(quant_linears(model).values())
        self._weights = [PathLength(local(layer.weight)) for layer in self._layers]
        self._quantized = [PathLength(layer.quantized_weight()) for layer in self._layers]

    def record(self) -> None:
        """Add the distance between the weights of the last call and the present ones."""
        for layer, weight, quantized in zip(self._layers, self._weights, self._quantized):
            weight.add(local(layer.weight))
            quantized.add(layer.quantized_weight())

    def ratios(self) -> dict[nn.Parameter, Tensor]:
        """R_w of every element by weight, fp32 in the weight's shape; 0 if the element did not move.

        The ratios are those of this process's rows if a weight is sharded.
        """
        return {
            layer.weight: oscillation_ratio(weight.length, quantized.length)
            for layer, weight, quantized in zip(self._layers, self._weights, self._quantized)
        }

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Last positions and lengths of the paths, so that another object can continue them."""
        paths = [*self._weights, *self._quantized]
        return {"last": [path.last for path in paths], "length": [path.length for path in paths]}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for path, last, length in zip([*self._weights, *self._quantized], *state.values(), strict=True):
            path.last.copy_(last)
            path.length.copy_(length)


@dataclass(frozen=True)
class Trajectory:
    """The positions of one weight at the start of a window and after each of its steps."""

    layer: str
    row: int
    column: int
    ratio: float
    """R_w."""
    latent: list[float]
    """w/S at each step, with the scale S that Q2 has then."""
    quantized: list[float]
    """Q2(w)/S."""


class OscillationWindow:
    """Follows linear layers over some steps of training, from the weights at construction to those at each `record`.

    Layers without Q2 (`nn.Linear`, or a recipe that switches it off) have paths of W only. A few rows of each weight,
    spread evenly, are kept at every step, as candidates for trajectories. Recording does not wait for the device;
    reading results does.

    Raises ValueError for a stochastic Q2, because measuring it would draw random numbers and so change the training.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], candidate_rows: int = 4) -> None:
        self.layers = dict(layers)
        self.quantized_layers = {
            name: layer
            for name, layer in self.layers.items()
            if isinstance(layer, QuantLinear) and layer.recipe.q2.enabled
        }
        for name, layer in self.quantized_layers.items():
            if layer.recipe.q2.rounding is Rounding.STOCHASTIC:
                raise ValueError(f"a window needs a Q2 without random numbers, got a stochastic one in {name}")
        self.weights = {name: TensorPath(layer.weight) for name, layer in self.layers.items()}
        self.quantized: dict[str, TensorPath] = {}
        self._rows = {}
        for name, layer in self.quantized_layers.items():
            last, count = layer.out_features - 1, min(candidate_rows, layer.out_features)
            self._rows[name] = torch.arange(count, device=layer.weight.device) * last // max(1, count - 1)
        self._candidates: dict[str, list[Tensor]] = {name: [] for name in self.quantized_layers}
        for name, layer in self.quantized_layers.items():
            self.quantized[name] = TensorPath(layer.quantized_weight())
            self._keep_candidates(name)

    @property
    def steps(self) -> int:
        """The number of steps recorded."""
        return next(iter(self.weights.values())).steps

    @torch.no_grad()
    def record(self) -> None:
        """Call after every step, and after Q-EMA's update if there is one."""
        for name, layer in self.layers.items():
            self.weights[name].add(layer.weight)
        for name, layer in self.quantized_layers.items():
            self.quantized[name].add(layer.quantized_weight())
            self._keep_candidates(name)

    @torch.no_grad()
    def _keep_candidates(self, name: str) -> None:
        rows = self._rows[name]
        weight, quantized = (path.last[rows] for path in (self.weights[name], self.quantized[name]))
        scales = group_scales(weight, self.layers[name].recipe.q2)
        self._candidates[name].append(torch.stack((weight / scales, quantized / scales)))

    def ratios(self) -> dict[str, Tensor]:
        """R_w of every element by layer with Q2, fp32 in the weight's shape."""
        return {
            name: oscillation_ratio(self.weights[name].length, quantized.length)
            for name, quantized in self.quantized.items()
        }

    def state_dict(self) -> dict:
        """Everything that was recorded, so that another window can continue it."""
        return {
            "weights": {name: path.state_dict() for name, path in self.weights.items()},
            "quantized": {name: path.state_dict() for name, path in self.quantized.items()},
            "candidates": {name: torch.stack(history) for name, history in self._candidates.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        for name, path in self.weights.items():
            path.load_state_dict(state["weights"][name])
        for name, path in self.quantized.items():
            path.load_state_dict(state["quantized"][name])
            device = self.layers[name].weight.device
            self._candidates[name] = list(state["candidates"][name].to(device).unbind())

    def trajectories(self, count: int) -> list[Trajectory]:
        """The `count` candidates with the largest R_w, in descending order."""
        best = []
        for name, ratios in self.ratios().items():
            rows, columns = self._rows[name], ratios.shape[1]
            top = ratios[rows].flatten().topk(min(count, rows.numel() * columns))
            best += [(ratio, name, index) for ratio, index in zip(top.values.tolist(), top.indices.tolist())]
        best.sort(key=lambda found: -found[0])
        found = []
        for ratio, name, index in best[:count]:
            columns = self.layers[name].in_features
            row = int(self._rows[name][index // columns])
            history = torch.stack(self._candidates[name]).flatten(2)[:, :, index].T.tolist()
            found.append(Trajectory(name, row, index % columns, ratio, *history))
        return found
