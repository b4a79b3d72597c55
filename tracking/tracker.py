"""Runs the measurements of `--track-oscillation` during a training run (paper section 4 and appendix A).

`quantization/measures/` has the formulas; this file decides when to apply them, and to what. It returns rows, which
`oscillation_csv.py` writes.

The last 30 steps of every epoch are a window. At its start and after each of its steps, the tracker reads the
weights and sends held-out images through the model in fp32, as evaluation does. It draws no random number, and the
training keeps its bits. Outside the windows it only counts steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from quantization import (
    BLOCK_LINEARS,
    Element,
    OscillationWindow,
    TensorPath,
    confidence,
    histogram,
    latent_weight,
    oscillates,
)
from runtime.errors import UserError
from tracking.oscillation_csv import ALL, Measure, Row

TRACKED_STEPS = 30  # T0 of the paper
NUM_IMAGES = 64
NUM_TRAJECTORIES = 4
BLOCK_DEPTH = 0.75  # the output of this block is measured: the 9th of 12, as in the paper's Table 3
CONFIDENCE_BINS = 32
LATENT_BINS_PER_STEP = 4  # of the grid's smallest step


class _Reached(Exception):
    """Raised when the block has its output, so that the rest of the model does not run."""


class OscillationTracker:
    """Measures one training run on one process.

    `dataset` gives (image, label) for an index; the fixed input is made of evenly spaced images. Raises UserError for
    a model without the linears of transformer blocks.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, device: torch.device) -> None:
        self.model = model
        self.layers, blocks = {}, {}
        for name, module in model.named_modules():
            ending = next((e for e in BLOCK_LINEARS if name.endswith("." + e)), None)
            if ending is not None and isinstance(module, nn.Linear):
                self.layers[name] = module
                blocks[name.removesuffix("." + ending)] = None
        if not blocks:
            raise UserError(
                f"--track-oscillation needs a model whose blocks have the linears {', '.join(BLOCK_LINEARS)}, "
                f"{type(model).__name__} has none; choose a Vision Transformer (deit_*, vit_*)"
            )
        self.block = list(blocks)[round(BLOCK_DEPTH * len(blocks)) - 1]
        count = min(NUM_IMAGES, len(dataset))
        chosen = (i * len(dataset) // count for i in range(count))
        self._images = torch.stack([dataset[i][0] for i in chosen]).to(device)
        self._weights: OscillationWindow | None = None
        self._until_window: int | None = None  # None until an epoch begins

    def before_epoch(self, steps: int) -> None:
        """Call at the start of an epoch that has `steps` left. A window that `load_state_dict` restored goes on."""
        if self._until_window is not None:
            return
        self._until_window = max(0, steps - TRACKED_STEPS)
        if self._until_window == 0:
            self._open()

    def after_step(self) -> None:
        """Call after every step of the epoch."""
        if self._weights is not None:
            self._weights.record()
            self._output.add(self._block_output())
            return
        self._until_window -= 1
        if self._until_window == 0:
            self._open()

    def after_epoch(self, epoch: int, step: int) -> list[Row]:
        """Close the window; `step` is the number of steps since the start of the run."""
        window, steps = self._weights, self._weights.steps
        self._weights = self._until_window = None
        if steps == 0:  # the run was resumed after the epoch's last step, and was not tracked before
            return []
        return [Row(epoch, step, steps, *numbers) for numbers in self._measurements(window)]

    def state_dict(self) -> dict:
        """The position of the epoch's window and what it has recorded."""
        if self._weights is None:
            return {"until_window": self._until_window}
        return {"until_window": 0, "weights": self._weights.state_dict(), "output": self._output.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._until_window, self._weights = state["until_window"], None
        if "weights" in state:
            self._open()
            self._weights.load_state_dict(state["weights"])
            self._output.load_state_dict(state["output"])

    def _open(self) -> None:
        self._weights = OscillationWindow(self.layers)
        self._output = TensorPath(self._block_output())

    @torch.no_grad()
    def _block_output(self) -> Tensor:
        """The block's output for the fixed images, in fp32, because the rounding of bf16 would count as change."""
        modes = [(module, module.training) for module in self.model.modules()]
        outputs = []

        def stop(block: nn.Module, inputs: tuple, output: Tensor) -> None:
            outputs.append(output)
            raise _Reached

        handle = self.model.get_submodule(self.block).register_forward_hook(stop)
        try:
            self.model.eval()
            with torch.compiler.set_stance("force_eager"):  # hooks do not run in compiled code
                self.model(self._images)
        except _Reached:
            pass
        finally:
            handle.remove()
            for module, training in modes:
                module.training = training
        return outputs[0]

    @torch.no_grad()
    def _measurements(self, window: OscillationWindow):
        """Yields (measure, where, x, value) of everything measured. The host waits for the device here."""
        yield from _with_mean(Measure.RATE_WEIGHT, {n: path.rate_of_change() for n, path in window.weights.items()})
        yield Measure.RATE_OUTPUT, self.block, None, float(self._output.rate_of_change())
        if not window.quantized:
            return
        yield from _with_mean(
            Measure.RATE_QUANTIZED, {n: path.rate_of_change() for n, path in window.quantized.items()}
        )
        ratios = window.ratios()
        sizes = {name: ratio.numel() for name, ratio in ratios.items()}
        total = sum(sizes.values())
        oscillating = {name: oscillates(ratio).sum().double() / ratio.numel() for name, ratio in ratios.items()}
        yield from _with_mean(Measure.OSCILLATING, oscillating, sizes)

        reach, latent_width = _latent_bins(layer.recipe.q2.element for layer in window.quantized_layers.values())
        confidence_counts, latent_counts, means = 0, 0, {}
        for name, layer in window.quantized_layers.items():
            latent = latent_weight(layer.weight, layer.recipe.q2)
            sure = confidence(latent, layer.recipe.q2.element)
            means[name] = sure.mean()
            latent_counts += histogram(latent, -reach, latent_width, round(2 * reach / latent_width))
            confidence_counts += histogram(sure, 0, 1 / CONFIDENCE_BINS, CONFIDENCE_BINS)
        yield from _with_mean(Measure.CONFIDENCE, means, sizes)
        for measure, counts, low, width in (
            (Measure.LATENT_HISTOGRAM, latent_counts, -reach, latent_width),
            (Measure.CONFIDENCE_HISTOGRAM, confidence_counts, 0, 1 / CONFIDENCE_BINS),
        ):
            for i, n in enumerate(counts.tolist()):
                yield measure, ALL, low + i * width, n / total

        for weight in window.trajectories(NUM_TRAJECTORIES):
            where = f"{weight.layer}[{weight.row}][{weight.column}]"
            yield Measure.RATIO, where, None, weight.ratio
            for x, (latent, quantized) in enumerate(zip(weight.latent, weight.quantized)):
                yield Measure.TRAJECTORY_LATENT, where, x, latent
                yield Measure.TRAJECTORY_QUANTIZED, where, x, quantized


def _latent_bins(elements: Iterable[Element]) -> tuple[float, float]:
    """Bins that fit w/S of every layer: the largest |w/S| that floor scaling leaves, and the width of a bin."""
    formats = [element.format for element in elements]
    reach = max(2.0 ** (fmt.max_exponent + 1) for fmt in formats)
    return reach, min(fmt.magnitudes[1] for fmt in formats) / LATENT_BINS_PER_STEP


def _with_mean(measure: Measure, by_layer: dict[str, Tensor], sizes: dict[str, int] | None = None):
    """Yields the mean over layers, weighted by `sizes` if given, then the number of each layer."""
    values = dict(zip(by_layer, torch.stack(list(by_layer.values())).tolist()))
    sizes = sizes or dict.fromkeys(values, 1)
    yield measure, ALL, None, sum(value * sizes[name] for name, value in values.items()) / sum(sizes.values())
    for name, value in values.items():
        yield measure, name, None, value
