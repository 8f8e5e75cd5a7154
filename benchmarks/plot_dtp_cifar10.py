"""Turn the results of `dtp_cifar10.py` into tables; nothing is measured here."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Panel, markdown, read_json, save_picture

RESULTS = Path(__file__).resolve().parent / "results" / "dtp_cifar10.json"
COMMAND = "python benchmarks/dtp_cifar10.py --data DATA"
SOLVER = "python benchmarks/dtp_cifar10.py --solver"

_Cell = tuple[str, str, int]


def cells(payload: Mapping[str, Any]) -> dict[str, dict[_Cell, list[dict[str, Any]]]]:
    """Sort what was measured: schedule to (network, method, budget) to rows, one per seed."""
    found: dict[str, dict[_Cell, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in payload.get("rows", ()):
        if "accuracy" in row:
            found[row["schedule"]][row["net"], row["method"], row["budget"]].append(row)
    return found


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _said(rows: Sequence[Mapping[str, Any]], name: str, digits: int) -> str:
    values = [float(row[name]) for row in rows]
    spread = f" ± {_spread(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _untrained(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write what a cut at the start left before any training."""
    told = [row for row in rows if row.get("accuracy_untrained") is not None]
    return _said(told, "accuracy_untrained", 1) if told else "–"


def table(payload: Mapping[str, Any]) -> str:
    """Write accuracies in markdown.

    Args:
        payload: what `dtp_cifar10.py` wrote.

    Returns:
        one row per schedule, budget and method, the best method of a budget first.
    """
    lines = []
    for schedule, found in cells(payload).items():

        def place(cell: _Cell, found: Any = found) -> tuple[str, int, float]:
            return cell[0], -cell[2], -statistics.mean(r["accuracy"] for r in found[cell])

        for cell in sorted(found, key=place):
            net, method, budget = cell
            rows = found[cell]
            lines.append([
                schedule, net, rows[0]["steps"], f"{budget} %", method,
                _untrained(rows), _said(rows, "accuracy", 1), _said(rows, "macs_kept", 3),
                len(rows), _said(rows, "seconds", 0), rows[0]["device"],
            ])  # fmt: skip
    head = ["schedule", "network", "steps", "MACs asked", "method", "before training"]
    return markdown([*head, "accuracy", "MACs kept", "seeds", "s", "device"], lines)


def solver_table(payload: Mapping[str, Any]) -> str:
    """Write the times of the threshold in markdown."""
    lines = [
        [
            f"{row['entries']:,}", row["device"], "own" if row["costs"] else "equal",
            row["passes"], f"{row['missed']:.0e}", row["seconds"], row["seconds_copy"],
            f"{row['passes'] * row['bytes'] / 1e9:.2f}",
        ]
        for row in payload.get("solver", ())
    ]  # fmt: skip
    head = ["entries", "device", "costs", "passes", "budget missed by", "s"]
    return markdown([*head, "s to copy them once", "GB read, at least"], lines)


def verdict(payload: Mapping[str, Any]) -> str:
    """Say how far `dtp` is from the best other method, budget by budget."""
    lines = []
    for schedule, found in cells(payload).items():
        for net, method, budget in sorted(found, key=lambda c: -c[2]):
            others = {m: rows for (n, m, b), rows in found.items() if (n, b) == (net, budget)}
            others.pop("dtp", None)
            if method != "dtp" or not others:
                continue
            own = statistics.mean(r["accuracy"] for r in found[net, method, budget])
            means = {m: statistics.mean(r["accuracy"] for r in rs) for m, rs in others.items()}
            best = max(means, key=lambda m: means[m])
            lines.append(
                f"- {schedule} schedule, {budget} % of MACs: dtp {own:.1f} %, best other "
                f"`{best}` {means[best]:.1f} %."
            )
    return "\n".join(lines)


def report(payload: Mapping[str, Any]) -> str:
    """Write the generated part of the page.

    Args:
        payload: what `dtp_cifar10.py` wrote; empty where nothing was.

    Returns:
        markdown.
    """
    parts = []
    if payload.get("rows"):
        parts += [table(payload), verdict(payload)]
    else:
        parts.append(f"Accuracies were not measured yet: `{COMMAND}`.")
    if payload.get("solver"):
        parts.append(solver_table(payload))
    else:
        parts.append(f"The threshold was not timed yet: `{SOLVER}`.")
    return "\n\n".join(part for part in parts if part)


def draw(payload: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy over MACs, one chart per schedule."""
    panels = []
    for schedule, found in cells(payload).items():
        series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        level = None
        for (_, method, budget), rows in found.items():
            values = [row["accuracy"] for row in rows]
            if method == "dense":
                level = statistics.mean(values)
            else:
                series[method].append((budget, statistics.mean(values), _spread(values)))
        panels.append(Panel(f"{schedule} schedule", series, level))
    if panels:
        save_picture(path, panels, x="MACs kept, %", y="top-1, %")


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    payload = read_json(args.results)
    args.results.with_suffix(".md").write_text(report(payload) + "\n")
    draw(payload, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
