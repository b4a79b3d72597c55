"""Steps whose loss or gradient is not finite: which are skipped, when a run gives up, and what the user is told."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantization.optim.step_count import Flag
from runtime import processes
from runtime.errors import NonFiniteSteps
from runtime.rng import rng_state, set_rng_state

MOST_IN_A_ROW = 10
"""Number of skipped steps in a row after which a run stops.

A run also stops at its end if every step of its last epoch was skipped, even if that epoch has fewer steps.
"""


@dataclass
class StepRecord:
    """One training step, kept for the report in case the run stops after it."""

    images: Tensor
    """The batch as the loader served it."""
    loss: Tensor
    norms: Tensor
    """Norm of each parameter's gradient."""
    place: str
    """Position in the run, and the learning rate."""
    in_a_row: int = 0
    """Number of consecutive skipped steps up to this one, once it is known."""


class Skips:
    """Decides which steps are skipped, and counts them.

    The device makes the decision and uses it. The host reads it one step later, while the device works on the next
    step, so neither waits for the other.
    """

    def __init__(self) -> None:
        self.count = 0
        """Skipped steps since the count was last reset to 0 by its reader."""
        self.in_a_row = 0
        self._unknown: tuple[StepRecord, Flag] | None = None

    def decide(self, step: StepRecord) -> Tensor:
        """1.0 if the step must be skipped, else 0.0: fp32, a scalar, the same on all processes.

        A norm of all gradients beyond fp32 counts as non-finite, because Adam's second moment would overflow as well.
        """
        norm = torch.linalg.vector_norm(step.norms)
        skip = processes.any_of(1 - (norm.isfinite() & step.loss.isfinite()).float())
        self._unknown = step, Flag(skip)
        return skip

    def settle(self, most: int = MOST_IN_A_ROW) -> StepRecord | None:
        """Count the newest step once. Returns it if at least `most` steps in a row were skipped, this one included."""
        if self._unknown is None:
            return None
        (step, flag), self._unknown = self._unknown, None
        skipped = bool(flag)
        self.count += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row < most:
            return None
        step.in_a_row, self.in_a_row = self.in_a_row, 0  # a run that goes on from here may skip as many again
        return step

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_a_row = state["in_a_row"]


def report(model: nn.Module, step: StepRecord, device: torch.device) -> NonFiniteSteps:
    """The message about the last skipped step, with the earliest cause found on any process.

    A layer's output is the earliest cause, then the loss, then a gradient. Every process must call this function.

    It sends the step's images through the model once more, in its present mode and the caller's autocast.
    """
    output = first_output_that_is_not_finite(model, step.images.to(device))
    loss = float(step.loss)
    if output is not None:
        images = "" if bool(step.images.isfinite().all()) else ", and the images are not finite themselves"
        rank, cause = 0, f"the first output that is not finite is that of {output}{images}"
    elif not math.isfinite(loss):
        rank, cause = 1, "every layer's output is finite, the loss is not"
    else:
        names = [name for name, p in model.named_parameters() if p.grad is not None]
        name = names[int(step.norms.nan_to_num(nan=torch.inf).argmax())]  # the first infinite one, else the largest
        rank, cause = 2, f"every layer's output is finite, the gradient of {name} is not or its norm is beyond fp32"
    _, loss, cause = min(processes.gather((rank, loss, cause)), key=lambda told: told[0])
    return NonFiniteSteps(
        f"loss or gradients were not finite in {step.in_a_row} steps in a row, the last at {step.place}, loss "
        f"{loss:.4g}: {cause}; lower --lr, lengthen --warmup-epochs, or look at the data"
    )


@torch.no_grad()
def first_output_that_is_not_finite(model: nn.Module, images: Tensor) -> str | None:
    """The first module whose output holds a NaN or Inf. Running statistics and random generators are restored."""
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    statistics = running_statistics(model)
    saved, generators = [tensor.clone() for tensor in statistics], rng_state()
    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks do not run in compiled code
            model(images)
    finally:
        for handle in handles:
            handle.remove()
        for tensor, old in zip(statistics, saved):
            tensor.copy_(old)
        set_rng_state(generators)
    return found[0] if found else None


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers of batch norms, which a forward pass in training mode changes. Transformers have none."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [tensor for norm in norms for tensor in norm.buffers(recurse=False)]
