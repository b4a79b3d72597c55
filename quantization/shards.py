"""Reads and builds single sharded tensors (DTensors), so that quantizers and optimizers work on this process's rows.

`runtime/sharding.py` shards whole models and gathers their checkpoints; this file only handles the tensors that it has
made. Each process holds some rows of a weight [C, D]. A row is never divided, and neither are Q2's groups of 32 along
D, so quantizing a shard gives the shard of the quantized weight, code for code. Functions that work element by element
need only the shards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell if `tensor` is a DTensor, of which this process holds a part."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, which share its memory. Any other tensor is returned as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def sharded_like(values: Tensor, tensor: Tensor) -> Tensor:
    """A tensor sharded like `tensor` whose rows on this process are `values`; just `values` if it is not sharded."""
    if not is_sharded(tensor):
        return values
    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
