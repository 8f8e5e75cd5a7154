"""One rank or two: the same bytes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent

WORKER = """
import sys
import torch
import torch.distributed as dist
import torch_otprune as otp
from tests.cases import CASES

torch.set_num_threads(1)
rank, world, name, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", rank=rank, world_size=world)
policy = otp.Policy(
    rules=otp.Channels(), budget=otp.Budget(macs=0.6),
    calibration=otp.Calibration(samples=32, probe=16),
)
model, batch = CASES[name].model(), CASES[name].batch(32)
share = batch[rank::world]
with otp.attach(model, policy) as attached:
    plan = otp.observe(attached, list(share.split(5))).plan()
report = otp.apply_(model, plan, list(share.split(7)))
answer = torch.cat([v.flatten().double() for v in model.state_dict().values()])
torch.save((plan.to_json(), answer), out)
if world > 1:
    dist.destroy_process_group()
"""


ODD = """
import sys
import torch
import torch.distributed as dist
import torch_otprune as otp
from tests.cases import CASES

torch.set_num_threads(1)
rank, world, name, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", rank=rank, world_size=world)
policy = otp.Policy(
    rules=otp.Channels(), budget=otp.Budget(macs=0.6),
    calibration=otp.Calibration(samples=32, probe=1),
)
model, batch = CASES["mlp"].model(), CASES["mlp"].batch(32)
if name == "probe":  # one probe sample for two ranks
    with otp.attach(model, policy) as attached:
        text = otp.observe(attached, batch[rank::world].split(5)).plan().to_json()
elif name == "idle":  # the second rank knows the model, but saw nothing
    with otp.attach(model, policy, example=batch[:2]) as attached:
        if rank == 0:
            model(batch)
        text = attached.plan().to_json()
else:  # the second rank has no data at all
    try:
        otp.prune_(model, policy, [] if rank else [batch], timing=0)
    except otp.OTPruneError as error:
        text = error.problem
    with otp.attach(model, policy) as attached:
        if rank == 0:
            model(batch)
        try:
            attached.plan()
        except otp.OTPruneError as error:
            text += error.fix
torch.save(text, out)
dist.barrier()  # a rank that leaves first may abort the one that still closes its sockets
dist.destroy_process_group()
"""


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _run(world: int, name: str, folder: Path, worker: str = WORKER) -> list[Path]:
    """Run the worker on some ranks of this machine."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    files = [folder / f"{name}-{world}-{rank}.pt" for rank in range(world)]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(rank), str(world), name, str(file)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, file in enumerate(files)
    ]  # fmt: skip
    try:
        for job in jobs:
            said, _ = job.communicate(timeout=120)
            assert job.returncode == 0, said
    finally:
        for job in jobs:
            job.kill()
    return files


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_the_plan_is_byte_identical_on_one_and_two_ranks(tmp_path: Path) -> None:
    import torch

    found = [torch.load(f) for world in (1, 2) for f in _run(world, "residual", tmp_path)]
    texts, weights = zip(*found, strict=True)
    assert texts[0] == texts[1] == texts[2]
    assert torch.equal(weights[1], weights[2])


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("name", ["probe", "idle"])
def test_a_rank_that_saw_less_plans_the_same(name: str, tmp_path: Path) -> None:
    import torch

    one, two = (torch.load(f) for f in _run(2, name, tmp_path, ODD))
    assert one == two


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_all_ranks_fail_if_one_has_no_data(tmp_path: Path) -> None:
    import torch

    one, two = (torch.load(f) for f in _run(2, "empty", tmp_path, ODD))
    assert one.startswith("the data of rank 1 cannot be used.")
    assert two.startswith("the data yielded no batch.")
    assert one.endswith("rank 1 saw none.") and two.endswith("rank 1 saw none.")
