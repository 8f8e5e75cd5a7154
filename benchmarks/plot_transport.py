"""Turn the results of `transport.py` into pictures and the dispatch page; nothing is timed here.

python benchmarks/plot_transport.py
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import markdown, read_json
from benchmarks.transport import DIMS, SIZES
from benchmarks.transport_thresholds import IN_FORCE
from torch_otprune import transport
from torch_otprune.transport.dispatch import TABLE

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "transport.json"
DOCS = HERE.parent / "docs"
INK, KEPT, GONE, FAINT = "#1f2933", "#00796b", "#c2410c", "#9aa5b1"
SHOWN = {
    "ours": KEPT,
    "scipy assignment": "#5b7db1",
    "POT exact": GONE,
    "POT Sinkhorn": "#d9a441",
    "geomloss tensorised": "#8661a8",
    "geomloss online": "#b39bc8",
}


def couplings_picture(path: Path) -> None:
    """Draw one problem three times: exact, entropic, and with a free second marginal."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(14, 2, generator=generator)
    y = torch.randn(7, 2, generator=generator) * 0.8 + torch.tensor([1.0, 0.4])
    asked: dict[str, dict[str, Any]] = {
        "exact": {"eps": 0},
        "entropic, eps 0.1": {"eps": 0.1},
        "semi-relaxed: nearest": {"relax": (float("inf"), 0.0)},
    }
    figure, axes = _figure(3)
    for axis, (title, settings) in zip(axes, asked.items(), strict=True):
        found = transport.coupling_points(x, y, **settings)
        mass = found.plan() / found.plan().max()
        for i, j in itertools.product(range(len(x)), range(len(y))):
            if mass[i, j] > 0.02:
                ends = torch.stack([x[i], y[j]]).T
                axis.plot(*ends, color=FAINT, linewidth=2.2 * float(mass[i, j]), zorder=1)
        axis.scatter(*x.T, color=GONE, s=22, zorder=2)
        axis.scatter(*y.T, color=KEPT, s=700 * found.plan().sum(0), zorder=2)
        axis.set(
            title=f"{title}\nW2 = {found.cost**0.5:.3f} by {found.solver}", xticks=[], yticks=[]
        )
    _save(figure, path)


def facility_picture(path: Path) -> None:
    """Draw the kept units of a small problem, its cost curve and the proven bound."""
    generator = torch.Generator().manual_seed(5)
    middle = torch.randn(6, 2, generator=generator) * 2
    x = middle[torch.arange(48) % 6] + 0.5 * torch.randn(48, 2, generator=generator)
    found = transport.facility_location(
        transport.sqdist(x), x.square().sum(1), sizes=range(1, 25), swaps=10, duals=400
    )
    figure, (left, right) = _figure(2)
    keep = found.keep(6)
    nearest = transport.sqdist(x, x[keep]).argmin(1)
    for i, j in enumerate(keep[nearest]):
        left.plot(*torch.stack([x[i], x[j]]).T, color=FAINT, linewidth=1, zorder=1)
    left.scatter(*x.T, color=GONE, s=16, zorder=2)
    left.scatter(*x[keep].T, color=KEPT, s=70, zorder=3)
    left.set(title="48 units moved onto 6 of them", xticks=[], yticks=[])
    sizes = range(1, 25)
    right.plot(sizes, found.curve[1:25], color=KEPT, label="cost of the kept set")
    right.plot(sizes, found.bound[1:25], color=INK, linestyle=":", label="no set costs less")
    right.set(title="the whole curve at once", xlabel="units kept", yscale="log")
    right.legend(fontsize=8, frameon=False)
    _save(figure, path)


def speed_picture(path: Path, data: Mapping[str, Any], d: int = 16) -> None:
    """Draw time over size for each purpose."""
    figure, axes = _figure(3)
    rows = [r for r in data["grid"].values() if r["d"] == d and "seconds" in r]
    for axis, purpose in zip(axes, ("value", "gradient", "plan"), strict=True):
        for method, color in SHOWN.items():
            points = sorted(
                (r["n"], r["seconds"])
                for r in rows
                if r["purpose"] == purpose and r["method"] == method
            )
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", ms=4, color=color, label=method)
        axis.set(title=f"{purpose}, d = {d}", xlabel="points")
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("processor seconds")
    axes[0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def _figure(count: int) -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "torch_otprune"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(4.2 * count, 3.6))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def dispatch_page(data: Mapping[str, Any]) -> str:
    """Write the page of figures: the table in force, and what was measured."""
    rules = [(i + 1, f"`{row.solver}`", row.when, row.why) for i, row in enumerate(TABLE)]
    rates, where = data["rates"], data["environment"]
    parts = [
        "# Transport: dispatch and figures",
        "Made by `benchmarks/plot_transport.py` from `benchmarks/results/transport.json`: no "
        "figure is typed by hand.",
        "## Which solver runs",
        "The first line for the purpose that applies is taken. `explain=True` puts the lines that "
        "were passed over into `why` of the `Coupling` or `Divergence`, and `solver=` forces one.",
        markdown(["", "solver", "when", "why"], rules),
        "## Figures",
        f"Measured on {where['date']}, {where['cpu']}, torch {where['packages']['torch']}, seed "
        f"{where['seed']}. Times are processor seconds of one thread, because the machine was "
        f"shared; it multiplies at {rates['gflops']} Gflop/s and reads {rates['gbytes']} GB/s. "
        "*Floor* is the cost matrix computed once and read for one iteration (on the line: both "
        "clouds read and written once). *Error* is that of W2, against the exact value in float64. "
        "*Ratio* is our time over the best peer with at most 1.2 times our error and, for plans, "
        "at most 1 % of the mass misplaced. *geomloss* is the time of geomloss alone over ours, "
        "for plans at the same temperature, in brackets the mass that its plan misplaces; *auto* "
        "is the same over what the table picks, where that is at least as accurate.",
        _grid_table(data),
        _skipped(data),
        _not_run(data),
        _threshold_part(data),
        "### Named promises",
        _case_table(data),
        "### Graphics processors",
        markdown(["case", "result"], [(k, _gpu(v)) for k, v in data.get("gpu", {}).items()]),
        "## Sampling bias",
        "Two Gaussian laws with a decaying spectrum at a known W2 of 0.173. Each cell is what an "
        "estimator reads over the truth, and in brackets what it reads between two halves of one "
        "sample, where the truth is 0. A reading that its null explains says nothing.",
        _bias_table(data),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _grid_table(data: Mapping[str, Any]) -> str:
    head = [
        "n",
        "d",
        "purpose",
        "solver",
        "seconds",
        "floor",
        "error",
        "MiB",
        "best peer",
        "ratio",
        "geomloss",
        "auto",
    ]
    rows = [
        (
            f"{v['n']:,}".replace(",", " "), v["d"], v["purpose"], v["solver"],
            f"{v['seconds']:.2g}", f"{v['floor']:.1g}", f"{v['error']:.0e}",
            f"{v['extra_mib']:.0f}",
            v.get("peer", "none as accurate"), f"{v['ratio']:.2f}" if "ratio" in v else "",
            _geomloss(v), f"{v['geomloss_auto']:.1f} x" if "geomloss_auto" in v else "",
        )
        for v in data.get("verdict", [])
    ]  # fmt: skip
    return markdown(head, rows)


def _geomloss(entry: Mapping[str, Any]) -> str:
    if "geomloss" not in entry:
        return ""
    off = f" ({entry['geomloss_marginal']:.0%} off)" if entry["purpose"] == "plan" else ""
    return f"{entry['geomloss']:.1f} x{off}"


def _skipped(data: Mapping[str, Any]) -> str:
    rows = [r for r in data.get("grid", {}).values() if "skipped" in r and r["method"] == "ours"]
    told = {(r["n"], r["d"], r["skipped"]) for r in rows}
    there = {(r["n"], r["d"]) for r in data.get("grid", {}).values()}
    missing = set(itertools.product(SIZES, DIMS)) - there
    told |= {
        (n, d, "the run ended before it; run the benchmark again to fill it") for n, d in missing
    }
    if not told:
        return ""
    lines = [f"- n = {n}, d = {d}: {why}" for n, d, why in sorted(told)]
    return "Cells of ours that were not measured:\n\n" + "\n".join(lines)


def _not_run(data: Mapping[str, Any]) -> str:
    """List peers that were not started, with what they would have taken."""
    told: dict[tuple[int, str], list[str]] = {}
    for r in data.get("grid", {}).values():
        if r["method"] != "ours" and str(r.get("skipped", "")).startswith("not run"):
            seconds = f", {r['estimate']:.2g} s" if "estimate" in r else ""
            place = f"{r['purpose']} at d = {r['d']}{seconds}"
            told.setdefault((r["n"], r["method"]), []).append(place)
    lines = [f"- n = {n}, {name}: {'; '.join(where)}" for (n, name), where in told.items()]
    head = "Cells of others that were not started, with the seconds expected of them:"
    return "\n\n".join([head, "\n".join(lines)]) if lines else ""


def _threshold_part(data: Mapping[str, Any]) -> str:
    rows = [r for r in data.get("thresholds", {}).values() if "low_seconds" in r]
    if not rows:
        return ""
    table = [
        (
            r["threshold"], IN_FORCE[r["threshold"]], r["at"], r["low"], f"{r['low_seconds']:.2g}",
            r["high"], f"{r['high_seconds']:.2g}", f"{r['worth']:g}",
        )
        for r in rows
    ]  # fmt: skip
    head = ["threshold", "in force", "at", "up to it", "s", "beyond it", "s", "worth"]
    said = (
        "Both sides of each threshold of the table, at sizes below it and above. *Worth* is how "
        "many times longer the side up to the threshold may take for what it gives more: an exact "
        "plan, or dimensions kept. A test holds every threshold to these figures."
    )
    return "\n\n".join(["### Where the thresholds come from", said, markdown(head, table)])


def _case_table(data: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{c['promise']:g}", f"{c['seconds']:.2f}", f"{c['wall']:.2f}")
        if "seconds" in c
        else (name, f"{c['promise']:g}", c["skipped"], "")
        for name, c in data.get("cases", {}).items()
    ]
    return markdown(["case", "promised s", "processor s", "wall s, machine shared"], rows)


def _gpu(value: Any) -> str:
    if isinstance(value, str):
        return value
    return ", ".join(f"{k} {v:.3g}" for k, v in value.items())


def _bias_table(data: Mapping[str, Any]) -> str:
    rows = [row for row in data.get("bias", {}).values() if "truth" in row]
    names = [k for k, v in rows[0].items() if isinstance(v, dict)] if rows else []

    def told(row: Mapping[str, Any], name: str) -> str:
        read = f"{row[name]['value'] / row['truth']:.2f}"
        return read + (f" ({row[name]['null'] / row['truth']:.2f})" if "null" in row[name] else "")

    body = [(r["d"], r["n"], *(told(r, name) for name in names)) for r in rows]
    return markdown(["d", "n", *names], body)


def main() -> None:
    """Draw and write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    data, pictures = read_json(args.results), args.docs / "pictures"
    couplings_picture(pictures / "transport_couplings.svg")
    facility_picture(pictures / "transport_facility.svg")
    speed_picture(pictures / "transport_speed.svg", data)
    (args.docs / "transport_dispatch.md").write_text(dispatch_page(data))


if __name__ == "__main__":
    main()
