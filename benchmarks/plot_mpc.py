"""Turn the results of `mpc.py` into a table and a picture; nothing is measured here."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import markdown, read_json

RESULTS = Path(__file__).resolve().parent / "results" / "mpc.json"
GOAL_PARAMS, GOAL_MSE, GOAL_SPEED = 13_000, 1.5e-4, 2.0

Rows = list[dict[str, Any]]


def grouped(payload: Mapping[str, Any]) -> dict[tuple[str, float], Rows]:
    """Put the seeds of each net and share together, in the order of the file."""
    found: dict[tuple[str, float], Rows] = {}
    for row in payload["rows"]:
        found.setdefault((row["net"], row["kept"]), []).append(row)
    return found


def mean(rows: Rows, key: str) -> float:
    """Average a number over seeds."""
    return statistics.mean(row[key] for row in rows)


def spread(rows: Rows, key: str, form: str, *, scale: float = 1.0) -> str:
    """Write a mean and, of several seeds, the standard deviation."""
    values = [scale * row[key] for row in rows if row[key] is not None]
    if not values:
        return "none"
    said = format(statistics.mean(values), form)
    return said if len(values) == 1 else f"{said} ± {format(statistics.stdev(values), form)}"


def certificate(rows: Rows) -> str:
    """Name how convexity is known, and how often it fails."""
    kinds = dict.fromkeys(row["convex"] for row in rows)
    worst = max(row["violations"] for row in rows)
    return ", ".join(kinds) + (f" ({100 * worst:.3g} % of pairs fail)" if worst else "")


def table(payload: Mapping[str, Any]) -> str:
    """Write one line per net and share."""
    groups = grouped(payload)
    lines = []
    for (net, kept), rows in groups.items():
        dense = groups[net, 1.0]
        ratio = mean(dense, "seconds_per_step") / mean(rows, "seconds_per_step")
        lines.append([
            net,
            "dense" if kept == 1.0 else f"{100 * kept:.0f} %",
            f"{mean(rows, 'params') / 1e3:.1f} k",
            spread(rows, "test_mse", ".2f", scale=1e4),
            certificate(rows),
            spread(rows, "lipschitz", ".2f"),
            spread(rows, "seconds_per_step", ".0f", scale=1e3),
            f"{ratio:.1f}x",
            f"{mean(rows, 'iterations'):.0f}",
            f"{mean(rows, 'closed_loop_cost'):.2f}",
        ])  # fmt: skip
    head = ["net", "kept", "parameters", "test MSE, 1e-4", "convex", "Lipschitz bound",
            "ms per control step", "faster than dense", "iterations", "cost of the run",
            ]  # fmt: skip
    return markdown(head, lines)


def verdict(payload: Mapping[str, Any]) -> str:
    """Say whether the number to beat was beaten."""
    groups = grouped(payload)
    lines = []
    for (net, kept), rows in groups.items():
        if net != "ICRNN" or kept == 1.0:
            continue
        dense = groups[net, 1.0]
        speed = mean(dense, "seconds_per_step") / mean(rows, "seconds_per_step")
        kinds = {row["convex"] for row in rows} == {row["convex"] for row in dense}
        checks = {
            f"at most 13 k parameters: {mean(rows, 'params') / 1e3:.1f} k": (
                mean(rows, "params") <= GOAL_PARAMS
            ),
            f"test MSE at most 1.5e-4: {mean(rows, 'test_mse'):.2e}": (
                mean(rows, "test_mse") <= GOAL_MSE
            ),
            f"certificate unchanged: {rows[0]['convex']}": kinds,
            f"control steps at least 2x faster: {speed:.2f}x": speed >= GOAL_SPEED,
        }
        said = "; ".join(f"{text} ({'yes' if ok else 'no'})" for text, ok in checks.items())
        lines.append(f"- ICRNN at {100 * kept:.0f} %: {said}.")
    return "\n".join(lines)


def page(payload: Mapping[str, Any]) -> str:
    """Write table, verdict and conditions."""
    env = payload["environment"]
    seeds = len({row["seed"] for row in payload["rows"]})
    noise = payload["rows"][0]["noise"]
    conditions = (
        f"Trained on outputs with noise {noise:g} (in units of their range), tested without; "
        f"{seeds} seed{'s' * (seeds > 1)}; {env['cpu']}, one thread, torch "
        f"{env['packages']['torch']}, {env['date']}."
    )
    return f"{table(payload)}\n\n{conditions}\n\n{verdict(payload)}\n"


def picture(payload: Mapping[str, Any], path: Path) -> None:
    """Draw error and solver time against parameters, one line per net."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(payload)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for net in dict.fromkeys(net for net, _ in groups):
        mine = sorted((mean(r, "params"), r) for (n, _), r in groups.items() if n == net)
        proved = all(row["convex"] == "structural" for _, rows in mine for row in rows)
        style = {"marker": "o", "linestyle": "-" if proved else ":"}
        for axis, key in zip(axes, ("test_mse", "seconds_per_step"), strict=True):
            axis.plot(*_points(mine, key), label=net, **style)
    axes[0].axhline(GOAL_MSE, color="gray", linestyle="--", label="to beat")
    axes[0].set(ylabel="test MSE, scaled units", title="pruned without training or labels")
    axes[1].set(
        ylabel="seconds of solver per control step", title="solid: proved convex; dotted: not"
    )
    for axis in axes:
        axis.set(xlabel="parameters", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _points(mine: Sequence[tuple[float, Rows]], key: str) -> tuple[list[float], list[float]]:
    return [params for params, _ in mine], [mean(rows, key) for _, rows in mine]


def main(words: list[str] | None = None) -> None:
    """Write table and picture beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    payload = read_json(args.json)
    if not payload.get("rows"):
        raise SystemExit(f"{args.json.name} has no rows: run mpc.py first.")
    args.json.with_suffix(".md").write_text(page(payload), encoding="utf-8")
    picture(payload, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
