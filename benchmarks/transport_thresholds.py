"""Which figures the thresholds of the dispatch table follow from: both sides of each, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.transport_harness import SEED, alone, best_of, clouds
from torch_otprune import transport
from torch_otprune.transport.dispatch import EXACT, LOW_CPU, PROGRAM, REDUCED, REPEAT, STORED
from torch_otprune.transport.exact import _by_assignment, _by_program
from torch_otprune.transport.geometry import Cloud, softmin
from torch_otprune.transport.keops import softmin_keops, unavailable_because

__all__ = ["IN_FORCE", "QUESTIONS", "SLACK", "contradicts", "thresholds"]

SLACK = 1.5  # times by which the side that the table takes may be slower before it is wrong
# An exact plan is worth more than an entropic one, which is 3 to 20 % off: so many times longer.
WORTH = 4.0
PATIENCE = 4.0  # seconds that an exact plan of unequal weights may take
IN_FORCE = {
    "EXACT": EXACT["cpu"],
    "REPEAT": REPEAT,
    "PROGRAM": PROGRAM,
    "STORED": STORED,
    "LOW_CPU": LOW_CPU,
    "REDUCED": REDUCED,
}


def _exact(n: int) -> dict[str, Any]:
    x, y = clouds(n, 16)
    return _both(
        lambda: transport.coupling_points(x, y, solver="exact"),
        lambda: transport.coupling_points(x, y, eps=0.02, solver="scaling"),
    )


def _repeat(copies: int) -> dict[str, Any]:
    """Couple 3k points with 4k, which takes 12k copies, by assignment and by program."""
    n, m = copies // 4, copies // 3
    cost = transport.sqdist(clouds(n, 8)[0], clouds(m, 8)[1])
    a, b = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
    return _both(
        lambda: _by_assignment(cost, a, math.lcm(n, m)),
        lambda: _by_program(cost.double(), a.double(), b.double()),
    )


def _program(n: int) -> dict[str, Any]:
    x, y = clouds(n, 8)
    generator = torch.Generator().manual_seed(SEED)
    a, b = (torch.rand(n, generator=generator) + 0.1 for _ in range(2))
    a, b = a / a.sum(), b / b.sum()
    took = best_of(lambda: transport.coupling_points(x, y, a, b, solver="exact"), times=5)
    return {"low_seconds": took["seconds"], "high_seconds": PATIENCE}


def _stored(entries: int) -> dict[str, Any]:
    n = math.isqrt(entries)
    x, y = clouds(n, 16)
    return _both(
        lambda: transport.coupling_points(x, y, eps=0.05, solver="scaling", tol=5e-3),
        lambda: transport.coupling_points(x, y, eps=0.05, solver="blocks", tol=5e-3),
    )


def _low(d: int) -> dict[str, Any]:
    reason = unavailable_because()
    if reason is not None:
        return {"skipped": f"not run: {reason}"}
    x, y = clouds(8192, d)
    h = y[:, 0].contiguous()
    softmin_keops(x[:8], y, h, 1.0, 2.0)  # the first call compiles
    return _both(
        lambda: softmin_keops(x, y, h, 1.0, 2.0),
        lambda: softmin(Cloud(x, y, 2.0), h, 1.0),
    )


def _reduced(d: int) -> dict[str, Any]:
    """Walk over all pairs in d dimensions, and in so few that exponentials are all it does."""
    (x, y), (low_x, low_y) = clouds(8192, d), clouds(8192, 4)
    h = y[:, 0].contiguous()
    return _both(
        lambda: softmin(Cloud(x, y, 2.0), h, 1.0),
        lambda: softmin(Cloud(low_x, low_y, 2.0), h, 1.0),
    )


# What is asked: the threshold, what lies at or below it and what above, where it is measured, how
# many times longer the lower side may take, and how to measure both.
QUESTIONS: dict[str, tuple[str, str, tuple[int, ...], float, Callable[[int], dict[str, Any]]]] = {
    "EXACT": ("assignment", "kernel scaling, 3 to 20 % off", (512, 2048, 8192), WORTH, _exact),
    "REPEAT": ("assignment of copies", "linear program", (768, 1536, 3072, 6144), 1.0, _repeat),
    "PROGRAM": ("linear program", "what it may take", (512, 1024, 2048, 3072), 1.0, _program),
    "STORED": ("cost stored", "cost recomputed", (2**20, 2**24, 2**26), 1.0, _stored),
    "LOW_CPU": ("KeOps", "torch in blocks", (1, 2, 4, 8, 16), 1.0, _low),
    "REDUCED": ("so many dimensions", "4 dimensions", (16, 64, 256), 2.0, _reduced),
}


def thresholds(data: dict[str, Any], limit: float) -> Iterator[None]:
    """Measure both sides of every threshold, below it and above."""
    rows = data.setdefault("thresholds", {})
    for name, (low, high, places, worth, run) in QUESTIONS.items():
        for at in places:
            key = f"{name} {at}"
            if key not in rows:
                found = alone(lambda run=run, at=at: run(at), 4 * limit)
                asked = {"threshold": name, "at": at, "low": low, "high": high, "worth": worth}
                rows[key] = asked | found
                yield


def contradicts(row: dict[str, Any], value: float) -> bool:
    """Say whether a measured place speaks against a threshold at this value."""
    if "low_seconds" not in row:
        return False
    ratio = row["low_seconds"] / (row["worth"] * row["high_seconds"])
    return ratio > SLACK if row["at"] <= value else ratio < 1 / SLACK


def _both(low: Callable[[], Any], high: Callable[[], Any]) -> dict[str, Any]:
    first, second = best_of(low, times=5), best_of(high, times=5)
    return {"low_seconds": first["seconds"], "high_seconds": second["seconds"]}
