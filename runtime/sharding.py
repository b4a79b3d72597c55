"""Shards whole models over processes (FSDP2), for models that do not fit on one GPU, and gathers them for checkpoints.

Every process keeps a part of weights, averages and optimizer states. `quantization/shards.py` handles single sharded
tensors, for the quantizers and optimizers that work on this process's part.

Parameters are sharded along their first axis between the steps and gathered, one block at a time, for the forward and
backward passes. They stay fp32 on the way, so a layer quantizes the very weights that it would quantize unsharded.
Checkpoints are gathered: a file does not tell how it was made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from quantization import quant_linears
from quantization.shards import is_sharded
from runtime import processes


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard `model`, in place, over all processes, which must hold the same weights; each block on its own.

    The model may be on the CPU: a block goes to `device` only to be sharded. Moving averages of Q-EMA become
    parameters without gradients, so that they are sharded and gathered as their weights are. Call this before the
    optimizer is made.
    """
    for layer in quant_linears(model).values():
        if layer.recipe.q_ema_beta is not None:
            average = layer.weight_ema
            del layer.weight_ema
            layer.weight_ema = nn.Parameter(average, requires_grad=False)
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    for unit in (*_blocks(model), model):
        # The root's parameters are gathered again for the backward pass, like any block's: between two passes, training
        # or not, all are shards.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def is_sharded_model(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the children of every module that timm names `blocks`."""
    lists = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks")
    return [block for found in lists for block in found.children()]


@torch.no_grad()
def gathered(state: object) -> object:
    """A nest of dicts and lists with every sharded tensor gathered, on the CPU.

    All processes must call it. The main one gets the gathered tensors, the others get None in their places.
    """
    if isinstance(state, dict):
        return {name: gathered(part) for name, part in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(gathered, state))
    if not isinstance(state, Tensor) or not is_sharded(state):
        return state
    whole = state.detach().full_tensor()
    return whole.cpu() if processes.is_main() else None


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load gathered tensors into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: _placed_like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load gathered tensors into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {
        index: {name: _placed_like(value, parameters[index]) for name, value in of_parameter.items()}
        for index, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": placed})


def _placed_like(value: object, tensor: Tensor | None) -> object:
    """`value`, which every process has as a whole, sharded like `tensor` if their shapes agree."""
    if not isinstance(tensor, DTensor) or not isinstance(value, Tensor) or value.shape != tensor.shape:
        return value
    whole = value.detach().to(tensor.device)
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
