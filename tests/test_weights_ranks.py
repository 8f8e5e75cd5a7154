"""Weights go alike on one rank and on two."""

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
from torch import nn

torch.set_num_threads(1)
rank, world, name, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", rank=rank, world_size=world)
torch.manual_seed(0)
layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
model, batch = nn.Sequential(*layers).double(), torch.randn(64, 8).double()
mode = {} if name in ("ntk", "wanda") else {"mode": "parallel"}
rule = otp.Weights(keep=0.5, criterion={"kind": name, **mode})
share = batch[rank::world]
report = otp.prune_(model, otp.Policy(rules=[rule]), list(share.split(16)), timing=0)
answer = torch.cat([v.flatten() for v in model.state_dict().values()])
torch.save((answer, report.bound.certified), out)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("kind", ["alps", "net_trim", "ntk", "wanda"])
def test_two_ranks_leave_the_weights_that_one_leaves(kind: str, tmp_path: Path) -> None:
    (one,) = (torch.load(path) for path in _run(1, kind, tmp_path, WORKER))
    first, second = (torch.load(path) for path in _run(2, kind, tmp_path, WORKER))
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    torch.testing.assert_close(first[0], one[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(first[0] == 0, one[0] == 0)
