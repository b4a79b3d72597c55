"""Steps whose loss or gradient is not finite: which ones a run skips, when it gives up, and what to tell then."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantization.optim.snapshot import rng_state, set_rng_state
from quantization.optim.step_count import Flag
from runtime import processes
from runtime.errors import NonFiniteSteps

MOST_IN_A_ROW = 10  # skipped steps after which a run stops; at its end a whole epoch of them is enough


@dataclass
class Step:
    """One training step, for the report in case that it is the last one."""

    images: Tensor
    """As the loader gave them."""
    loss: Tensor
    norms: Tensor
    """Of the gradients, by parameter."""
    place: str
    """Where in the run it is, with the learning rate."""
    in_a_row: int = 0
    """Skipped steps up to this one, once that is known."""


class Skips:
    """Decides which steps are skipped, and counts them.

    The decision is taken and used on the device. The host learns of it one step later, while the device works at the
    next step, so that neither waits for the other.
    """

    def __init__(self) -> None:
        self.count = 0
        """Skipped steps since whoever reports them has set it to 0."""
        self.in_a_row = 0
        self._unknown: tuple[Step, Flag] | None = None

    def decide(self, step: Step) -> Tensor:
        """1.0 if the step must be skipped, else 0.0: fp32, a scalar, the same on all processes.

        A norm of all gradients that is beyond fp32 counts as not finite: Adam's second moment would be, too.
        """
        norm = torch.linalg.vector_norm(step.norms)
        skip = processes.any_of(1 - (norm.isfinite() & step.loss.isfinite()).float())
        self._unknown = step, Flag(skip)
        return skip

    def settle(self, most: int = MOST_IN_A_ROW) -> Step | None:
        """Count the newest step, once; returns it if it is the last of `most` skipped ones in a row, or of more."""
        if self._unknown is None:
            return None
        (step, flag), self._unknown = self._unknown, None
        skipped = bool(flag)
        self.count += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row < most:
            return None
        step.in_a_row, self.in_a_row = self.in_a_row, 0  # whoever goes on from here has as many to spare again
        return step

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_a_row = state["in_a_row"]


def report(model: nn.Module, step: Step, device: torch.device) -> NonFiniteSteps:
    """What to tell of the last skipped step. All processes must call it; it speaks of the first one that has a cause.

    Sends the step's images through the model once more, in the mode in which it is, within the caller's autocast.
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
    """Name of the first module whose output holds a NaN or Inf; running statistics and generators stay as they are."""
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
        with torch.compiler.set_stance("force_eager"):  # a compiled model would not see the hooks
            model(images)
    finally:
        for handle in handles:
            handle.remove()
        for tensor, old in zip(statistics, saved):
            tensor.copy_(old)
        set_rng_state(generators)
    return found[0] if found else None


def running_statistics(model: nn.Module) -> list[Tensor]:
    """What forward passes in training mode change: the buffers of batch norms. Transformers have none."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [tensor for norm in norms for tensor in norm.buffers(recurse=False)]
