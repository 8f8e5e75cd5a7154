"""Turn the results of `methods_cifar10.py` into tables, sentences and a picture; measures nothing.

The sentences are computed: where the flagship stands, where least squares does not help, and where
a published recipe is not beaten.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Panel, markdown, read_json, save_picture
from benchmarks.methods import FLAGSHIP, OURS, REPAIRS
from benchmarks.methods_cifar10 import BUDGETS, NET, WIDTHS, cases

RESULTS = Path(__file__).resolve().parent / "results" / "methods_cifar10.json"
Key = tuple[int, str, str, str]  # budget, widths, method, repair
_PLACE = ("method", "widths", "repair", "budget", "seed")


@dataclass(frozen=True)
class Cell:
    """One method with a repair at a budget, over its seeds.

    Args:
        error: mean top-1 error, percent.
        spread: its standard deviation between seeds; 0 where there is one.
        errors: seed to error.
        loss: mean cross-entropy.
        seconds: mean CPU time to decide, cut and repair, without calibration; None if unknown.
        macs: largest share of the dense MACs kept.
        noise: one standard error of the error, from the number of images alone.
    """

    error: float
    spread: float
    errors: Mapping[int, float]
    loss: float
    seconds: float | None
    macs: float
    noise: float

    def said(self) -> str:
        """Write the error, and its spread where there are several seeds."""
        return f"{self.error:.1f}" + (f" ± {self.spread:.1f}" if len(self.errors) > 1 else "")

    def behind(self, other: Cell) -> float | None:
        """Subtract errors over the seeds that both have; None where they share none."""
        shared = self.errors.keys() & other.errors.keys()
        gaps = [self.errors[seed] - other.errors[seed] for seed in shared]
        return statistics.mean(gaps) if gaps else None


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
        {row["seed"]: row["error"] for row in rows},
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
        last = here.get((name, OURS))
        took = [f"{last.loss:.3f}", f"{last.macs:.1%}", _time(last)] if last else ["–"] * 3
        rows.append([name, *(c.said() if c else "–" for c in found), *took])
    head = ["method", "no repair", "its own", "least squares", "its loss", "MACs kept", "CPU s"]
    return markdown(head, rows) if rows else ""


def _time(cell: Cell) -> str:
    return "–" if cell.seconds is None else f"{cell.seconds:.1f}"


def standing(cells: Mapping[Key, Cell], budget: int, widths: str = "budget") -> str:
    """Say where the flagship stands at a budget, with our widths and least squares."""
    here = {m: c for (b, w, m, r), c in cells.items() if (b, w, r) == (budget, widths, OURS)}
    own = here.get(FLAGSHIP)
    if own is None or len(here) < 2:
        return ""
    gaps = {name: own.behind(cell) for name, cell in here.items() if name != FLAGSHIP}
    known = {name: gap for name, gap in gaps.items() if gap is not None}
    if not known:
        return ""
    best = max(known, key=lambda name: known[name])
    behind = known[best]
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
        by = ours.behind(cell) if ours is not None and repair != OURS else None
        if by is not None and by > 0:
            found.append(f"`{name}` at {budget} % ({widths}, {repair}: {by:.1f} points)")
    return found


def unbeaten(cells: Mapping[Key, Cell]) -> list[str]:
    """List published recipes, at equal widths, that beat the same method done our way."""
    found = []
    for (budget, widths, name, repair), cell in sorted(cells.items()):
        ours = cells.get((budget, "budget", name.split(", published")[0], OURS))
        published = widths == "uniform" and repair != OURS
        by = ours.behind(cell) if ours is not None and published else None
        if by is not None and by > 0:
            found.append(f"`{name}` at {budget} % ({repair})")
    return found


def foresight(cells: Mapping[Key, Cell]) -> str:
    """Say by how much prices that foresee later refits lower the error of each method."""
    found = []
    for (budget, widths, name, repair), cell in sorted(cells.items()):
        after = cells.get((budget, "foreseen", name, repair))
        by = cell.behind(after) if after is not None and widths == "budget" else None
        if by is not None:
            found.append(f"`{name}` at {budget} % {by:+.1f}")
    return ", ".join(found)


def choosing(payload: Mapping[str, Any]) -> list[str]:
    """Say what comes of choosing by output error on held-out images, as `otp.compare` does.

    Args:
        payload: what `methods_cifar10.py` wrote.

    Returns:
        a sentence per budget at which the test error of what was chosen is known: the choice reads
        validation images without labels, the error test images.
    """
    errors = {
        tuple(row[n] for n in _PLACE): row
        for row in payload.get("rows", ())
        if row["split"] == "test" and "error" in row
    }
    held: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in payload.get("rows", ()):
        known = tuple(row[n] for n in _PLACE) in errors
        if row["split"] == "validation" and row["repair"] == OURS and "moved" in row and known:
            held[row["budget"], row["seed"]].append(row)
    told = []
    for budget in sorted({b for b, _ in held}):
        seeds = {s: rows for (b, s), rows in held.items() if b == budget and len(rows) > 1}
        if not seeds:
            continue
        picked = [min(rows, key=lambda row: row["moved"]) for rows in seeds.values()]
        best = [
            min(errors[tuple(r[n] for n in _PLACE)]["error"] for r in rows)
            for rows in seeds.values()
        ]
        error = [errors[tuple(row[n] for n in _PLACE)]["error"] for row in picked]
        names = ", ".join(sorted({f"`{row['method']}` ({row['widths']})" for row in picked}))
        told.append(
            f"At {budget} % the least output error on validation images picks {names}: "
            f"{statistics.mean(error):.1f} % error; the best on the test images themselves "
            f"{statistics.mean(best):.1f} %."
        )
    return told


def sentences(cells: Mapping[Key, Cell]) -> list[str]:
    """Say what the numbers say."""
    budgets = sorted({key[0] for key in cells} - {100})
    told = [
        text for w in ("budget", "foreseen") for b in budgets if (text := standing(cells, b, w))
    ]
    paired = [key for key in cells if key[3] == OURS]
    if paired:
        worse = unhelped(cells)
        text = "Wherever it was measured, least squares is the best repair of a method"
        told.append(_except(text, worse))
    if any(key[1] == "uniform" for key in cells) and any(key[1] == "budget" for key in cells):
        text = "Wherever both were measured, our budget with least squares beats published recipes"
        told.append(_except(text, unbeaten(cells)))
    return told


def _except(text: str, places: Sequence[str]) -> str:
    return f"{text}, except {'; '.join(places)}." if places else f"{text}."


def unmeasured(payload: Mapping[str, Any], split: str) -> int:
    """Count the cells that the full plan has and the results have not."""
    known = {
        tuple(row[n] for n in _PLACE)
        for row in payload.get("rows", ())
        if row["split"] == split and "error" in row
    }
    plan = cases(seeds=range(3), budgets=BUDGETS, widths=WIDTHS)
    return sum((c.method.name, c.widths, c.repair, c.budget, c.seed) not in known for c in plan)


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
    said = ", ".join(map(str, sorted(images)))
    most = max(len(cell.errors) for cell in cells.values())
    parts = [f"Top-1 error in percent on {said} {split} images; one to {most} seeds."]
    if dense := cells.get((100, "", "dense", "none")):
        parts[0] += f" Dense: {dense.error:.1f}, loss {dense.loss:.3f}."
    whole = {row["net"] for row in payload["rows"]} == {NET}  # others have only a part of the plan
    if missing := unmeasured(payload, split) if whole else 0:
        parts[0] += f" {missing} cells of the full plan, three seeds each, are not measured yet."
    told = sentences(cells)
    if gained := foresight(cells):
        told.append(f"Points that `foresee=True` gains: {gained}.")
    if split == "test":
        told += choosing(payload)
    parts += ["\n".join(f"- {text}" for text in told)]
    for widths in sorted({key[1] for key in cells} - {""}, key=list(_CHOSEN).index):
        for budget in sorted({k[0] for k in cells if k[1] == widths}):
            parts.append(f"**{_CHOSEN[widths]}, {budget} % of the MACs**")
            parts.append(table(cells, budget, widths))
    return "\n\n".join(parts)


def picture(cells: Mapping[Key, Cell], path: Path) -> None:
    """Draw error over MACs kept: what is lowest at a budget is on the Pareto front there.

    Args:
        cells: the results.
        path: where to.
    """
    shown = {
        "no repair": ("budget", "none"),
        "the repair of its paper": ("budget", "own"),
        "least squares": ("budget", OURS),
        "least squares, foresee=True": ("foreseen", OURS),
    }
    dense = cells.get((100, "", "dense", "none"))
    panels = []
    for title, place in shown.items():
        series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        # the flagship last, and so on top
        for key, cell in sorted(cells.items(), key=lambda item: (item[0][2] == FLAGSHIP, item[0])):
            if (key[1], key[3]) == place:
                series[key[2]].append((key[0], cell.error, cell.spread))
        if series:
            panels.append(Panel(title, series, dense and dense.error))
    if panels:
        save_picture(path, panels, x="MACs kept, %", y="top-1 error, %")


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, write tables and a picture beside the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    payload = read_json(args.json)
    if not payload.get("rows"):
        raise SystemExit(f"{args.json.name} has no rows: run methods_cifar10.py first.")
    splits = {row["split"] for row in payload["rows"] if "error" in row}
    for split in sorted(splits):
        text = page(payload, split=split)
        name = args.json.stem + ("" if split == "test" else f"_{split}")
        args.json.with_name(f"{name}.md").write_text(text + "\n")
        print(text)
    picture(summarise(payload), args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
