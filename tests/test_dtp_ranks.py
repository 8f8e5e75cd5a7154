"""Masks under DistributedDataParallel: the same bits on all ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import torch_otprune as otp
from tests.test_dtp import data, net, policy, search

ROOT = Path(__file__).parent.parent
WORKER = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
import torch_otprune as otp
from tests.test_dtp import data, net, policy, search

torch.set_num_threads(1)
rank, out = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2)
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
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_ranks_that_see_different_data_hold_the_same_masks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    where |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(out)],
            env=os.environ | where,
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        for rank, out in enumerate(outs)
    ]
    for worker in workers:
        said = worker.communicate(timeout=240)[1]
        assert worker.returncode == 0, said.decode()[-2000:]
    (soft, keep, weights), other = (torch.load(out, weights_only=False) for out in outs)
    assert keep == other[1]
    for name in ("scores", "logits", "first", "second", "flat"):
        assert torch.equal(soft[name], other[0][name]), name
    assert float((soft["flat"] * (1 - soft["flat"])).mean()) > 0
    assert all(torch.equal(value, other[2][name]) for name, value in weights.items())
    _as_one_process(soft)


def _as_one_process(soft: dict[str, torch.Tensor]) -> None:
    """Train on all data in one process: the average gradient is that of the whole batch."""
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
    torch.testing.assert_close(pool.scores, soft["scores"], atol=1e-3, rtol=0)
