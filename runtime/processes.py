"""One process, or several under `torchrun`: the same calls work for both."""

from __future__ import annotations

import gc
import inspect
import os
import sys
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from functools import lru_cache
from typing import TextIO, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  DDP imports it, late: as default arguments it holds the group of that moment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""The time that a rank waits in a collective for another one that neither comes nor dies, for example because its node
is gone. It is longer than any work that one rank does alone, such as writing a checkpoint. When a rank dies, torchrun
ends the job at once, without this wait."""
_STORE_TIMEOUT = timedelta(seconds=5)
_FAILED = "a rank has failed"
_LET_GO = 0.1
"""Seconds to wait for threads that nothing joins: DTensor's caches keep FSDP's device mesh, and with it the group."""


def start(device_type: str) -> torch.device:
    """Join the process group that torchrun's environment describes, if any; returns this process's device.

    Raises UserError if there are fewer GPUs than processes on this node.
    """
    if "RANK" not in os.environ:
        return torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        present, needed = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", device.index + 1))
        if needed > present:
            raise UserError(
                f"--nproc-per-node must be at most the number of GPUs, {present}, got {needed}; start fewer"
            )
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return device


def stop() -> None:
    """Leave the process group and wait for its threads. No model should communicate through it any more.

    Gloo's threads release the tensors of a collective shortly after it has returned. If Python is shutting down by
    then, the process ends with SIGABRT instead of its exit code (pytorch/pytorch#190489).
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD  # joins its threads when the last reference to it goes
    dist.destroy_process_group()
    gc.collect()  # DDP refers to it in cycles
    del group
    time.sleep(_LET_GO)


def data_parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP around `model`. Buffers are not broadcast: averages and counters advance alike in every process."""
    # Newer releases of PyTorch renamed the argument and warn about the old name.
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **{sync: False})


def check_same_parameters(model: nn.Module) -> None:
    """Raises ValueError if processes train parameters of different names or shapes. Every process must call it."""
    trained = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    if any(theirs != trained for theirs in gather(trained)):
        raise ValueError("all processes must train the same parameters, got other names or shapes in one of them")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def average(tensors: list[Tensor]) -> None:
    """Mean over several processes, in place, of tensors of one dtype on one device.

    With two processes the bits are those of DDP. With more, DDP's buckets may be summed in another order.
    """
    together = torch.cat([tensor.flatten() for tensor in tensors]).mul_(1 / world_size())
    dist.all_reduce(together)
    parts = together.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def any_of(flag: Tensor) -> Tensor:
    """The maximum of all processes' flags, in place."""
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Overwrite `tensors` with those of the main process. They travel one at a time through `device`."""
    if not dist.is_initialized():
        return
    for tensor in tensors:
        there = tensor.detach().to(device)
        dist.broadcast(there, src=0)
        tensor.copy_(there)


def wait_for_all() -> None:
    """Return when every process has called it."""
    if dist.is_initialized():
        dist.barrier()


def from_main(value: T) -> T:
    """The main process's `value`, in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value: T) -> list[T]:
    """Every process's `value`, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather(values: Tensor) -> Tensor:
    """The `values` of every process, stacked by rank. They must have the same shape everywhere."""
    if not dist.is_initialized():
        return values.unsqueeze(0)
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def first_to_report(failure: str) -> bool:
    """Tell the other ranks that this one fails. Returns False if another one has failed with the same message.

    It asks torchrun's own store, so it works without a process group or with a broken one. Without torchrun it returns
    True.
    """
    store = _store()
    if store is None:
        return True
    try:
        store.set(_key(_FAILED), "")
        return store.add(_key(failure), 1) == 1
    except RuntimeError:  # the store's node has gone
        return True


def another_has_failed() -> bool:
    """Return True if a rank has called `first_to_report`."""
    store = _store()
    try:
        return store is not None and store.check([_key(_FAILED)])
    except RuntimeError:
        return False


def _key(text: str) -> str:
    """The store outlives its processes if torchrun restarts them, so keys carry the number of restarts."""
    return f"tetrajet/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{text}"


@lru_cache(maxsize=1)
def _store() -> dist.TCPStore | None:
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False)
    except RuntimeError:
        return None


def say(message: str) -> None:
    """One line on the terminal, from the main process."""
    if is_main():
        write_line(message, sys.stdout)


def write_line(message: str, stream: TextIO) -> None:
    """Characters that the stream cannot write, such as those of a file name that is not UTF-8, come as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(message.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


SHARED_MEMORY = (
    "loader processes hand over batches in /dev/shm, which is too small; pass --num-workers 0, or start the container "
    "with a larger --shm-size, such as 8g"
)


def lacks_shared_memory(error: BaseException) -> bool:
    """Tell if a loader process has failed because /dev/shm is full: by an error of its own, or by a bus error."""
    text = str(error)
    return "allocate shared memory" in text or "Bus error" in text or "/torch_" in text and "No space left" in text


def end_loaders(error: BaseException | None) -> None:
    """End the loader processes that are still alive after `error`. They ignore SIGTERM, so Python would wait for them.

    They end when their iterator is deleted, which the frames of the traceback still hold.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
