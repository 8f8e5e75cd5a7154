"""What consumers that are no modules read, and what experts contribute, on one rank or two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.test_distributed import _run

WORKER = """
import sys
import torch
import torch.distributed as dist
import torch_otprune as otp
from tests.test_experts import batches, net
from tests.test_statistics_loose import Table, attention, drawn, recurrent

torch.set_num_threads(1)
rank, world, name, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", rank=rank, world_size=world)
torch.manual_seed(0)
rules, batch = [otp.Channels()], drawn(24, 4, 5)
if name == "experts":
    model, rules, batch = net(), [otp.Experts(keep=3)], torch.cat(batches(2))
elif name == "recurrent":
    model, batch = recurrent(torch.nn.LSTM, batch_first=True, num_layers=2), drawn(24, 7, 3)
elif name == "heads":
    model, rules, batch = attention(same=False), [otp.Heads(keep=1)], drawn(24, 5, 3)
else:
    model = Table("routed").double().eval()
budget = None if name in ("experts", "heads") else otp.Budget(params=0.7)
policy = otp.Policy(
    rules=rules, budget=budget, calibration=otp.Calibration(samples=32, probe=12)
)
with otp.attach(model, policy) as attached:
    otp.observe(attached, list(batch[rank::world].split(5)))
    told = attached.observation()
    plan = attached.plan()
    sums = {key: own.product for key, own in sorted(told.moments.items())}
    felt = {}
    if told.sensitivity is not None:
        tables = enumerate(told.sensitivity.tables())
        felt = {(i, key): own for i, table in tables for key, own in sorted(table.items())}
torch.save((plan.to_json(), sums, felt), out)
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("name", ["experts", "recurrent", "heads", "table"])
def test_statistics_and_plan_are_the_same_on_one_and_two_ranks(name: str, tmp_path: Path) -> None:
    found = [torch.load(f) for world in (1, 2) for f in _run(world, name, tmp_path, WORKER)]
    (alone, sums, felt), *others = found
    assert any("@" in key or name == "experts" for key in sums)
    for plan, mine, own in others:
        assert plan == alone
        torch.testing.assert_close(mine, sums)
        torch.testing.assert_close(own, felt)
