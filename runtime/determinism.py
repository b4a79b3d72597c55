"""`--deterministic`: a run on a GPU that repeats bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runtime.errors import UserError

WORKSPACE, REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # cuBLAS, "Results reproducibility"


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within this context, PyTorch avoids algorithms whose sums depend on the order of threads. A CPU needs no change.

    Enter it before the first matmul on the GPU. Raises UserError for an operation without a deterministic algorithm.
    """
    if device.type != "cuda":
        yield
        return
    memory, cudnn = torch.utils.deterministic, torch.backends.cudnn
    before = (
        *(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        *(memory.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark, os.environ.get(WORKSPACE)),
    )
    if before[-1] not in REPEATABLE:
        os.environ[WORKSPACE] = REPEATABLE[0]
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it would find bugs but costs time, and results do not change
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UserError(f"--deterministic does not go with this run: {str(error).split('.')[0]}; drop it") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark = before[2:5]
        if before[-1] is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = before[-1]
