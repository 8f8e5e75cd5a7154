"""Cells, paired clocks and a resumable loop: what the depth benchmarks share."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import environment, read_json, write_json

__all__ = ["Cell", "Spec", "paired_latency", "run"]


@dataclass(frozen=True)
class Spec:
    """One method.

    Args:
        side: `baseline`, `ours` or `dense`.
        choice: what decides which blocks go.
        repair: what mends the rest.
    """

    side: str
    choice: str = "none"
    repair: str = "none"

    @property
    def method(self) -> str:
        """Name it in one word."""
        return f"{self.choice}/{self.repair}"


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Args:
        net: name of the network.
        spec: the method.
        removed: how many blocks go.
        seed: of the calibration data and of what is drawn.
        measure: does the work and returns plain JSON values.
    """

    net: str
    spec: Spec
    removed: int
    seed: int
    measure: Callable[[], dict[str, Any]]

    @property
    def place(self) -> dict[str, Any]:
        """Name the cell in its row."""
        where = {"net": self.net, **asdict(self.spec), "method": self.spec.method}
        return where | {"removed": self.removed, "seed": self.seed}


def _key(row: dict[str, Any]) -> tuple[object, ...]:
    return tuple(row[name] for name in ("net", "side", "method", "removed", "seed"))


def _attempt(cell: Cell) -> dict[str, Any]:
    """Measure, or say in the row why not: one bad setting must not stop a long run."""
    try:
        return cell.place | cell.measure()
    except Exception as error:
        return cell.place | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def run(cells: Iterable[Cell], out: Path, *, question: str, force: bool = False) -> None:
    """Measure what is not there yet, and write after each cell.

    Args:
        cells: what to measure, in order.
        out: the JSON file; its other rows are kept.
        question: what the benchmark asks.
        force: measure again what is there. What failed is always tried again.
    """
    payload = {"environments": {}, "rows": []} | read_json(out) | {"question": question}
    rows = {_key(row): row for row in payload["rows"]}
    for cell in cells:
        key = _key(cell.place)
        if not force and key in rows and "error" not in rows[key]:
            continue
        row, env = _attempt(cell), environment()
        row["environment"] = hashlib.sha256(json.dumps(env).encode()).hexdigest()[:8]
        payload["environments"][row["environment"]] = env
        rows[key] = row
        write_json(out, payload | {"rows": list(rows.values())})
        print(*key, row.get("error", row.get("shown")), row.get("seconds"), flush=True)


@torch.inference_mode()
def paired_latency(
    dense: nn.Module, small: nn.Module, call: Callable[[nn.Module], Any], *, rounds: int
) -> dict[str, float]:
    """Time two networks in turn, so that both meet the same disturbances.

    Args:
        dense: the reference.
        small: the other.
        call: runs one batch through a network.
        rounds: how often each is timed, after one warm-up each.

    Returns:
        `dense_ms` and `small_ms`, medians; `latency`, the median of each round's small over dense;
        `latency_low` and `latency_high`, its quartiles.
    """
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        # Who goes first alternates: the second finds warmer caches.
        pair = {n: _seconds(call, m) for n, m in _turn(dense, small, turn)}
        if turn:
            times.append((pair["dense"], pair["small"]))
    ratios = sorted(small / dense for dense, small in times)
    low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return {
        "dense_ms": round(1e3 * statistics.median(d for d, _ in times), 3),
        "small_ms": round(1e3 * statistics.median(s for _, s in times), 3),
        "latency": round(statistics.median(ratios), 4),
        "latency_low": round(low, 4),
        "latency_high": round(high, 4),
    }


def _turn(dense: nn.Module, small: nn.Module, turn: int) -> Sequence[tuple[str, nn.Module]]:
    pair = [("dense", dense), ("small", small)]
    return pair if turn % 2 else pair[::-1]


def _seconds(call: Callable[[nn.Module], Any], model: nn.Module) -> float:
    start = time.perf_counter()
    call(model)
    return time.perf_counter() - start
