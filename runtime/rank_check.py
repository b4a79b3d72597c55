"""`--check-ranks` compares the weights of all processes.

Ranks that train in parallel start with the same weights and apply the same updates, so their bits stay equal. After a
fault in memory or in the network, or a bug, training would go on with gradients of different models, unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from quantization.shards import is_sharded
from runtime import processes
from runtime.errors import RanksDiffer

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RankCheck:
    """Compares weights, Q-EMA averages, other buffers and Q-Ramping's periods between processes.

    Sharded tensors are left out, because every process holds another part of them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int, step: int = 0) -> None:
        """Compare after `every` steps; `step` is the number of steps that the run has done."""
        self.model, self.optimizer, self.every, self.step = model, optimizer, every, step

    @torch.no_grad()
    def after_step(self) -> None:
        """Call once after every optimizer step, in all processes.

        Raises RanksDiffer in all of them. It names the step, the first tensor that differs, and a rank.
        """
        self.step += 1
        if self.step % self.every:
            return
        tensors = {name: tensor for name, tensor in self._tensors() if not is_sharded(tensor)}
        if not tensors:
            return
        sums = processes.all_gather(torch.stack([checksum(tensor) for tensor in tensors.values()])).tolist()
        for name, of_ranks in zip(tensors, zip(*sums)):
            if len(set(of_ranks)) > 1:
                usual = max(of_ranks, key=of_ranks.count)  # the first of several, so rank 0's where two ranks differ
                rank, other = next(i for i, s in enumerate(of_ranks) if s != usual), of_ranks.index(usual)
                raise RanksDiffer(
                    f"after step {self.step} rank {rank} holds another {name} than rank {other}; resume from the "
                    "last checkpoint, and look at the hardware if it happens again"
                )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        for name, parameter in self.model.named_parameters():
            period = self.optimizer.state.get(parameter, {}).get("period")
            if period is not None:
                yield f"period of {name}", period


def checksum(tensor: Tensor) -> Tensor:
    """Sum of all elements' bit patterns as signed integers modulo 2**64: an int64 scalar on the device.

    A single changed element always changes the sum.
    """
    return tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
