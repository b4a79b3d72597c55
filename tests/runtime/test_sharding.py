"""A model whose parts lie on several processes, and the whole that is gathered from them."""

from __future__ import annotations

# Processes shard a model of two blocks with uneven rows, and load it and an optimizer from whole tensors.
SHARDED = """
import copy, torch
from torch import nn
from torch.distributed.tensor import DTensor
from quantization import Recipe, swap_linears
from runtime import processes, sharding

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 40)
        self.blocks = nn.Sequential(nn.Linear(40, 7), nn.Linear(7, 40))
    def forward(self, x):
        return self.blocks(self.stem(x))

device = processes.start("cpu")
torch.manual_seed(0)
whole = Net()
swap_linears(whole, Recipe().with_q_ema(0.5), ("blocks.0", "blocks.1"))
model = copy.deepcopy(whole)
sharding.shard(model, device)
assert sharding.is_sharded_model(model) and not sharding.is_sharded_model(whole)
assert all(isinstance(p, DTensor) for p in model.parameters())
assert "blocks.0.weight_ema" in dict(model.named_parameters())
assert not model.blocks[0].weight_ema.requires_grad
rows = processes.gather(model.blocks[0].weight.to_local().shape[0])
assert sum(rows) == 7 and max(rows) < 7, rows

gathered = sharding.gathered(model.state_dict())
assert gathered.keys() == whole.state_dict().keys()
for name, tensor in whole.state_dict().items():
    if processes.is_main():
        assert torch.equal(gathered[name], tensor), name
    elif isinstance(model.state_dict()[name], DTensor):
        assert gathered[name] is None, name  # one copy in memory is enough

other = {name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor + 5
         for name, tensor in whole.state_dict().items()}
sharding.load_model(model, other)
back = sharding.gathered(model.state_dict())
if processes.is_main():
    assert all(torch.equal(back[name], other[name]) for name in other)

optimizer = torch.optim.AdamW(model.parameters())
state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(40, 8), "exp_avg_sq": torch.randn(40, 8)}},
         "param_groups": optimizer.state_dict()["param_groups"]}
sharding.load_optimizer(optimizer, state)
moment = optimizer.state[model.stem.weight]["exp_avg"]
assert isinstance(moment, DTensor) and moment.to_local().shape == model.stem.weight.to_local().shape
again = sharding.gathered(optimizer.state_dict())["state"][0]
assert again["step"] == 3
if processes.is_main():
    assert torch.equal(again["exp_avg"], state["state"][0]["exp_avg"])
print("done")
processes.stop()
"""


def test_whole_to_parts_and_back(tmp_path, ranks):
    """Three processes, so that 7 and 40 rows cannot be shared evenly. Values come back bit for bit, to the main one."""
    result = ranks(tmp_path, SHARDED, processes=3)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n" * 3
