"""A penalty under DistributedDataParallel: one weight and one network on all ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.test_training_watch import BLOCKS, F, MaxSliced, Pressure, data, net

torch.set_num_threads(1)
rank, out = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2)
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
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_all_ranks_train_the_same_network_with_the_same_weight(tmp_path: Path) -> None:
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
        assert worker.communicate(timeout=240)[1] is not None and worker.returncode == 0
    (one, first), (two, second) = (torch.load(out) for out in outs)
    assert one == two > 0
    assert torch.equal(first, second)
