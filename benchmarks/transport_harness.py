"""Clouds, clocks and child processes: what the sections of `transport.py` share."""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import measured
from torch_otprune import transport

__all__ = ["SEED", "alone", "best_of", "clouds", "digest", "warm"]

SEED = 0
ROOT = Path(__file__).resolve().parents[1]


def digest() -> str:
    """Name the state of the code that is measured: cells of another state are not kept."""
    files = [*ROOT.glob("torch_otprune/transport/*.py"), *ROOT.glob("benchmarks/transport*.py")]
    parts = (path.name.encode() + path.read_bytes() for path in sorted(files))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def clouds(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Draw two Gaussian clouds that differ in mean and spread, as activations do."""
    generator = torch.Generator().manual_seed(SEED)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return x.to(dtype), (1.2 * y + 0.3 * scale).to(dtype)


def best_of(run: Callable[[], Any], *, seconds: float = 0.3, times: int = 200) -> dict[str, Any]:
    """Measure a call: its memory in a first run, the fastest of the next ones for its times.

    A first run that alone takes longer than `seconds` is not repeated.
    """
    with measured() as took:
        wall, cpu, answer = _clocked(run)
    walls, cpus = [wall], [cpu]
    if wall < seconds:
        walls, cpus = [], []
    while not walls or (len(walls) < times and sum(walls) < seconds):
        wall, cpu, answer = _clocked(run)
        walls.append(wall)
        cpus.append(cpu)
    both = {"seconds": min(cpus), "wall": min(walls), "runs": len(walls)}
    return both | {"extra_mib": round(took.extra_mib, 1), "answer": answer}


def _clocked(run: Callable[[], Any]) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    answer = run()
    return time.perf_counter() - wall, time.process_time() - cpu, answer


def alone(run: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """Run in a child process, and stop it after the limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(run, theirs))
    child.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(limit) else {"skipped": f"over the limit of {limit:g} s"}
    except EOFError:
        answer = {"skipped": "the process ended without an answer (memory)"}
    child.kill()
    child.join()
    return dict(answer)


def warm() -> None:
    """Import everything before the children are forked, so that no cell pays for it."""
    for name in ("scipy.optimize", "scipy.spatial.distance", "scipy.sparse", "geomloss", "ot"):
        importlib.import_module(name)
    # The first linear program loads more.
    transport.coupling(torch.rand(3, 3), torch.tensor([0.2, 0.3, 0.5]), eps=0)


def _child(run: Callable[[], dict[str, Any]], pipe: Any) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        pipe.send(run())
    except Exception as error:
        pipe.send({"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"})
