"""Training under DistributedDataParallel: the same masks, penalties and network on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import torch_otprune as otp
from tests.test_distributed import _run
from tests.test_dtp import data, net, policy, search

HEAD = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_otprune as otp
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
rank, world, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[4]
dist.init_process_group("gloo", rank=rank, world_size=world)
"""
TAIL = """
dist.barrier()
dist.destroy_process_group()
"""
MASKS = f"""{HEAD}
from tests.test_dtp import data, net, policy
model, (x, y) = net(), data(64)
parallel = DistributedDataParallel(model)
descent = torch.optim.SGD(model.parameters(), lr=0.05)
with otp.attach(model, policy(params="40%"), example=x[:2]) as attached:
    for step in range(12):
        loss = F.cross_entropy(parallel(x[rank::2]), y[rank::2])
        descent.zero_grad()
        loss.backward()
        descent.step()
        attached.step()
        if step == 8:
            soft = attached.state_dict()["masks"]["pools"][0]
    plan = attached.plan()
torch.save((soft, plan.keep(), model.state_dict()), out)
{TAIL}"""
PENALTY = f"""{HEAD}
from tests.test_training_watch import BLOCKS, MaxSliced, Pressure, data, net
model, (x, labels) = net(), data(64)
parallel = DistributedDataParallel(model)
descent = torch.optim.SGD(model.parameters(), lr=0.1)
with Pressure(model, BLOCKS, MaxSliced(every=2)) as pressure:
    for _ in range(5):
        loss = F.cross_entropy(parallel(x[rank::2]), labels[rank::2]) + pressure.penalty()
        descent.zero_grad()
        loss.backward()
        descent.step()
        pressure.step()
torch.save((pressure.base, torch.cat([p.detach().flatten() for p in model.parameters()])), out)
{TAIL}"""

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def test_ranks_that_see_different_data_hold_the_same_masks(tmp_path: Path) -> None:
    files = _run(2, "masks", tmp_path, MASKS)
    (soft, keep, weights), other = (torch.load(file, weights_only=False) for file in files)
    assert keep == other[1]
    for name in ("scores", "logits", "first", "second", "flat"):
        assert torch.equal(soft[name], other[0][name]), name
    assert float((soft["flat"] * (1 - soft["flat"])).mean()) > 0
    assert all(torch.equal(value, other[2][name]) for name, value in weights.items())
    # the average gradient is that of the whole batch in one process
    torch.testing.assert_close(_scores_of_one_process(), soft["scores"], atol=1e-3, rtol=0)


def _scores_of_one_process() -> torch.Tensor:
    model, (x, y) = net(), data(64)
    descent = torch.optim.SGD(model.parameters(), lr=0.05)
    with otp.attach(model, policy(params="40%"), example=x[:2]) as attached:
        for _ in range(9):
            descent.zero_grad()
            F.cross_entropy(model(x), y).backward()
            descent.step()
            attached.step()
        (pool,) = search(attached).pools
        attached.harden()
    scores: torch.Tensor = pool.scores
    return scores


def test_all_ranks_train_the_same_network_with_the_same_weight_of_a_penalty(tmp_path: Path) -> None:
    files = _run(2, "penalty", tmp_path, PENALTY)
    (one, first), (two, second) = (torch.load(file) for file in files)
    assert one == two > 0
    assert torch.equal(first, second)
