"""Ranks that hold other bits are noticed, at the right step and by name."""

from __future__ import annotations

import pytest
import torch

from runtime.rank_check import checksum

# Processes with a weight, a buffer and a period. One of them changes a single value before the fourth step.
DIFFERING = """
import torch
from torch import nn
from quantization import RampingAdamW
from runtime import processes
from runtime.errors import RanksDiffer
from runtime.rank_check import RankCheck

processes.start("cpu")
for changed, rank in (("weight", 1), ("counter", 0), ("period of weight", 2), ("nothing", 1)):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    model.register_buffer("counter", torch.zeros((), dtype=torch.int64))
    optimizer = RampingAdamW(model.parameters(), lr=0.1)
    optimizer.set_periods({model.weight: torch.full((3, 4), 2.0)})
    tensors = {"weight": model.weight.data, "counter": model.counter}
    tensors["period of weight"] = optimizer.state[model.weight]["period"]
    check, found = RankCheck(model, optimizer, every=2, step=1), "alike"
    try:
        for step in range(2, 7):
            if step == 3 and changed in tensors and processes.rank() == rank:
                tensors[changed].view(-1)[0] += 1
            check.after_step()
    except RanksDiffer as error:
        found = str(error).partition(";")[0]
    print(found)
processes.stop()
"""


def test_the_step_the_tensor_and_the_rank_that_stands_alone_are_named(tmp_path, ranks):
    """The comparisons are after steps 2, 4 and 6; every process gives the same report."""
    result = ranks(tmp_path, DIFFERING, processes=3)
    assert result.returncode == 0, result.stderr
    wanted = "after step 4 rank 1 holds another weight than rank 0\n"
    wanted += "after step 4 rank 0 holds another counter than rank 1\n"
    wanted += "after step 4 rank 2 holds another period of weight than rank 0\nalike\n"
    assert result.stdout == wanted * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
def test_the_checksum_that_ranks_compare_shows_each_bit(dtype):
    """Also one that is lost in a sum of the values, such as a zero's sign; equal bits have equal sums, NaN too."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    values = torch.tensor([3e2, -3e2, 0.0, 1.0]).to(dtype)
    for i in range(4):
        for bit in range(8 * dtype.itemsize - 1):
            other = values.clone()
            other.view(bits)[i] ^= 1 << bit
            assert checksum(other) != checksum(values) and checksum(other) == checksum(other.clone())
    if dtype.is_floating_point:
        assert checksum(torch.full((3,), torch.nan).to(dtype)) == checksum(torch.full((3,), torch.nan).to(dtype))
