"""Turn the results of `methods_cifar10.py` into tables, sentences and a picture; measures nothing.

The sentences are computed: where the flagship stands, where least squares does not help, and where
a published recipe is not beaten.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import markdown, read_json
from benchmarks.methods import FLAGSHIP, OURS, REPAIRS

RESULTS = Path(__file__).resolve().parent / "results" / "methods_cifar10.json"
Key = tuple[int, str, str, str]  # budget, widths, method, repair
_MARKS = {"none": "x", "own": "s", OURS: "o"}


@dataclass(frozen=True)
class Cell:
    """One method with a repair at a budget, over its seeds.

    Args:
        error: mean top-1 error, percent.
        spread: its standard deviation between seeds; 0 where there is one.
        seeds: how many.
        loss: mean cross-entropy.
        seconds: mean CPU time to decide, cut and repair, without calibration; None if unknown.
        macs: largest share of the dense MACs kept.
        noise: one standard error of the error, from the number of images alone.
    """

    error: float
    spread: float
    seeds: int
    loss: float
    seconds: float | None
    macs: float
    noise: float

    def said(self) -> str:
        """Write the error, and its spread where there are several seeds."""
        return f"{self.error:.1f}" + (f" ± {self.spread:.1f}" if self.seeds > 1 else "")


def summarise(payload: Mapping[str, Any], *, split: str = "test") -> dict[Key, Cell]:
    """Average every cell over its seeds; rows that failed are left out.

    Args:
        payload: what `methods_cifar10.py` wrote.
        split: whose rows.

    Returns:
        the cells, the dense network's under a budget of 100.
    """
    found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for row in payload.get("rows", ()):
        if row["split"] == split and "error" in row:
            found[row["budget"], row["widths"], row["method"], row["repair"]].append(row)
    return {key: _cell(rows) for key, rows in found.items()}


def _cell(rows: Sequence[Mapping[str, Any]]) -> Cell:
    read = {n: [row[n] for row in rows] for n in ("error", "loss", "macs_kept")}
    took = [row["cpu_seconds"] for row in rows if "cpu_seconds" in row]
    error = statistics.mean(read["error"])
    return Cell(
        error,
        statistics.stdev(read["error"]) if len(rows) > 1 else 0.0,
        len(rows),
        statistics.mean(read["loss"]),
        statistics.mean(took) if took else None,
        max(read["macs_kept"]),
        (error * (100 - error) / rows[0]["images"]) ** 0.5,
    )


def table(cells: Mapping[Key, Cell], budget: int, widths: str) -> str:
    """Tabulate one budget: a row per method, a column per repair, the best of ours on top.

    Args:
        cells: the results.
        budget: percent of the MACs.
        widths: who chose them.

    Returns:
        markdown; empty where there is nothing.
    """
    here = {(m, r): c for (b, w, m, r), c in cells.items() if (b, w) == (budget, widths)}
    names = {name for name, _ in here}

    def best(name: str) -> tuple[float, str]:
        return min(here[name, r].error for r in REPAIRS if (name, r) in here), name

    rows = []
    for name in sorted(names, key=best):
        found = [here.get((name, repair)) for repair in REPAIRS]
        last = next((c for c in reversed(found) if c), None)
        took = [f"{last.macs:.1%}", f"{last.loss:.3f}", _time(last)] if last else []
        rows.append([name, *(c.said() if c else "–" for c in found), *took])
    head = ["method", "no repair", "its own", "least squares", "MACs kept", "loss", "CPU s"]
    return markdown(head, rows) if rows else ""


def _time(cell: Cell) -> str:
    return "–" if cell.seconds is None else f"{cell.seconds:.1f}"


def standing(cells: Mapping[Key, Cell], budget: int, widths: str = "budget") -> str:
    """Say where the flagship stands at a budget, with our widths and least squares."""
    here = {m: c for (b, w, m, r), c in cells.items() if (b, w, r) == (budget, widths, OURS)}
    own = here.get(FLAGSHIP)
    if own is None or len(here) < 2:
        return ""
    rest = {name: cell for name, cell in here.items() if name != FLAGSHIP}
    best = min(rest, key=lambda name: rest[name].error)
    behind = own.error - rest[best].error
    where = f"At {budget} %" + (" with `foresee=True`" if widths == "foreseen" else "")
    if behind <= 0:
        return f"{where} `{FLAGSHIP}` is the best, {-behind:.1f} points before `{best}`."
    within = "within" if behind <= own.noise else "beyond"
    return (
        f"{where} `{best}` is the best, {behind:.1f} points before `{FLAGSHIP}`: "
        f"{within} one standard error of {own.noise:.1f}."
    )


def unhelped(cells: Mapping[Key, Cell]) -> list[str]:
    """List where least squares is behind another repair of the same method and widths."""
    found = []
    for (budget, widths, name, repair), cell in sorted(cells.items()):
        ours = cells.get((budget, widths, name, OURS))
        if repair != OURS and ours is not None and cell.error < ours.error:
            by = ours.error - cell.error
            found.append(f"`{name}` at {budget} % ({widths}, {repair}: {by:.1f} points)")
    return found


def unbeaten(cells: Mapping[Key, Cell]) -> list[str]:
    """List published recipes, at equal widths, that beat the same method done our way."""
    found = []
    for (budget, widths, name, repair), cell in sorted(cells.items()):
        ours = cells.get((budget, "budget", name.split(", published")[0], OURS))
        published = widths == "uniform" and repair != OURS
        if published and ours is not None and cell.error < ours.error:
            found.append(f"`{name}` at {budget} % ({repair})")
    return found


def front(cells: Mapping[Key, Cell], budget: int, widths: str = "budget") -> list[Key]:
    """List the Pareto front of error over seconds at one budget, the fastest first."""
    here = [(c.seconds, c.error, k) for k, c in _timed(cells, budget, widths)]
    found: list[Key] = []
    lowest = float("inf")
    for _, error, key in sorted(here):
        if error < lowest:
            lowest = error
            found.append(key)
    return found


def sentences(cells: Mapping[Key, Cell]) -> list[str]:
    """Say what the numbers say."""
    budgets = sorted({key[0] for key in cells} - {100})
    told = [
        text for w in ("budget", "foreseen") for b in budgets if (text := standing(cells, b, w))
    ]
    paired = [key for key in cells if key[3] == OURS]
    if paired:
        worse = unhelped(cells)
        told.append(_except("Least squares is the best of the repairs of every method", worse))
    if any(key[1] == "uniform" for key in cells) and any(key[1] == "budget" for key in cells):
        text = "Every method under our budget with least squares beats its published recipe"
        told.append(_except(text, unbeaten(cells)))
    return told


def _except(text: str, places: Sequence[str]) -> str:
    return f"{text}, except {'; '.join(places)}." if places else f"{text}."


_CHOSEN = {
    "budget": "Widths by our budget over the whole network",
    "foreseen": "Widths by our budget with `foresee=True`",
    "uniform": "The same share of every block's inner channels",
    FLAGSHIP: "The flagship's widths for all: only the choice within the layers differs",
}


def page(payload: Mapping[str, Any], *, split: str = "test") -> str:
    """Write all tables and sentences.

    Args:
        payload: what `methods_cifar10.py` wrote.
        split: whose rows.

    Returns:
        markdown.
    """
    cells = summarise(payload, split=split)
    images = {row["images"] for row in payload["rows"] if row["split"] == split and "error" in row}
    seeds = {key: cell.seeds for key, cell in cells.items()}
    said = ", ".join(map(str, sorted(images)))
    parts = [
        f"Top-1 error in percent on {said} {split} images; one to {max(seeds.values())} seeds."
    ]
    if dense := cells.get((100, "", "dense", "none")):
        parts[0] += f" Dense: {dense.error:.1f}, loss {dense.loss:.3f}."
    parts += ["\n".join(f"- {text}" for text in sentences(cells))]
    for widths in sorted({key[1] for key in cells} - {""}, key=list(_CHOSEN).index):
        for budget in sorted({k[0] for k in cells if k[1] == widths}):
            parts.append(f"**{_CHOSEN[widths]}, {budget} % of the MACs**")
            parts.append(table(cells, budget, widths))
    return "\n\n".join(parts)


def picture(cells: Mapping[Key, Cell], path: Path) -> None:
    """Draw error over seconds, one chart per budget, with the Pareto front.

    Args:
        cells: the results.
        path: where to.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = sorted({key[0] for key in cells if key[1] == "budget"})
    if not budgets:
        return
    figure, axes = pyplot.subplots(
        1, len(budgets), figsize=(5.2 * len(budgets), 4.6), squeeze=False
    )
    for axis, budget in zip(axes[0], budgets, strict=True):
        for key, cell in _timed(cells, budget, "budget"):
            flag = key[2] == FLAGSHIP
            colour = "#d9822b" if flag else "#2f6db5"
            axis.plot(cell.seconds, cell.error, _MARKS[key[3]], color=colour, alpha=0.9)
        edge = front(cells, budget)
        xs, ys = ([getattr(cells[key], n) for key in edge] for n in ("seconds", "error"))
        axis.plot(xs, ys, color="#8a909a", linewidth=1, zorder=0)
        for key in edge:
            axis.annotate(
                f" {key[2]}, {key[3]}", (cells[key].seconds, cells[key].error), fontsize=7
            )
        axis.set(xscale="log", title=f"{budget} % of the MACs", xlabel="seconds of CPU")
        axis.set(ylabel="top-1 error, %")
        axis.grid(alpha=0.3)
    handles = [pyplot.Line2D([], [], marker=m, linestyle="", color="#2f6db5", label=r)
               for r, m in _MARKS.items()]  # fmt: skip
    handles.append(pyplot.Line2D([], [], marker="o", linestyle="", color="#d9822b", label=FLAGSHIP))
    axes[0][-1].legend(handles=handles, fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _timed(cells: Mapping[Key, Cell], budget: int, widths: str) -> Iterator[tuple[Key, Cell]]:
    for key, cell in cells.items():
        if key[:2] == (budget, widths) and cell.seconds is not None:
            yield key, cell


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, write tables and a picture beside the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--split", default="test")
    args = parser.parse_args(words)
    payload = read_json(args.json)
    if not payload.get("rows"):
        raise SystemExit(f"{args.json.name} has no rows: run methods_cifar10.py first.")
    text = page(payload, split=args.split)
    args.json.with_suffix(".md").write_text(text + "\n")
    picture(summarise(payload, split=args.split), args.json.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
