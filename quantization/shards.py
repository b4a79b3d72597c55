"""Weights that are sharded over processes: each holds some of the rows, as a DTensor.

A row of a weight [C, D] is whole wherever it is, and so are Q2's groups of 32 along D: quantizing a shard gives the
shard of the quantized weight, code for code. Whatever acts element by element works on the shards alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's rows, sharing memory with `tensor`; a tensor that is not sharded as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def sharded_like(values: Tensor, tensor: Tensor) -> Tensor:
    """This process's rows `values` as a part of what is sharded as `tensor` is; as they are if that is not sharded."""
    if not is_sharded(tensor):
        return values
    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
