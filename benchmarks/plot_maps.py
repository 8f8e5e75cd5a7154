"""Turn what `maps.py` and `domain_shift.py` measured into tables and pictures.

python benchmarks/plot_maps.py
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import markdown, read_json

RESULTS = Path(__file__).resolve().parent / "results"
GAP = re.compile(r"Monge gap (\S+) -> (\S+);")
LAWS = re.compile(r"distance of laws (\S+) -> (\S+), by chance (\S+);")
MOVED = re.compile(r"(\d+) of (\d+) channels moved")

Rows = list[dict[str, Any]]


def by_method(payload: Mapping[str, Any]) -> dict[tuple[str, str], Rows]:
    """Gather the rows of every network and method; those that failed are left out."""
    found: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in payload.get("rows", ()):
        if "test" in row:
            found[row["net"], row["choice"]].append(row)
    return dict(found)


def mean(rows: Rows, name: str) -> float:
    """Average a column over the seeds."""
    return float(statistics.mean(row[name] for row in rows))


def _told(rows: Rows, pattern: re.Pattern[str]) -> list[tuple[float, ...]]:
    notes = (note["note"] for row in rows for note in row.get("notes", ()))
    return [tuple(map(float, m.groups())) for note in notes if (m := pattern.search(note))]


def _ends(rows: Rows, pattern: re.Pattern[str]) -> str:
    """Write the means of what every map reports, at both ends."""
    columns = [statistics.mean(column) for column in zip(*_told(rows, pattern), strict=True)]
    return " → ".join(f"{value:.3g}" for value in columns[:2]) if columns else "–"


def maps_table(payload: Mapping[str, Any]) -> str:
    """Write one line per network and map."""
    found = by_method(payload)
    lines = []
    for (net, name), rows in found.items():
        base = mean(found[net, "nothing"], "seconds") if (net, "nothing") in found else 0.0
        maps = max(len(rows[0].get("notes", ())), 1)
        moved, laws = _told(rows, MOVED), _told(rows, LAWS)
        lines.append([
            net,
            "dense" if name == "none" else name,
            f"{mean(rows, 'test'):.2f}",
            f"{mean(rows, 'validation'):.2f}",
            f"{max(mean(rows, 'seconds') - base, 0.0) / maps:.1f}" if _fitted(rows) else "–",
            _ends(rows, LAWS),
            f"{statistics.mean(n[2] for n in laws):.3g}" if laws else "–",
            _ends(rows, GAP),
            f"{100 * sum(m[0] for m in moved) / sum(m[1] for m in moved):.0f} %" if moved else "–",
        ])  # fmt: skip
    head = ["network", "map", "test", "validation", "s per map", "distance of laws"]
    return markdown([*head, "by chance", "Monge gap", "channels moved"], lines)


def _fitted(rows: Rows) -> bool:
    return any(row.get("notes") for row in rows)


def shift_table(payload: Mapping[str, Any]) -> str:
    """Write one line per method, worst first."""
    found = by_method(payload)
    lines = [
        [
            name,
            f"{mean(r, 'test'):.2f}",
            f"{mean(r, 'validation'):.2f}",
            f"{mean(r, 'seconds'):.0f}",
        ]
        for (_, name), r in sorted(found.items(), key=lambda item: mean(item[1], "test"))
    ]
    return markdown(["method", "test", "validation", "s"], lines)


def picture(found: Mapping[tuple[str, str], Rows], path: Path, *, y: str) -> None:
    """Draw what is reached against the seconds it takes, one chart per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nets = list(dict.fromkeys(net for net, _ in found))
    figure, axes = pyplot.subplots(1, len(nets), figsize=(6 * len(nets), 5), squeeze=False)
    for axis, net in zip(axes[0], nets, strict=True):
        mine = {name: rows for (n, name), rows in found.items() if n == net}
        for name, rows in mine.items():
            if name == "none" or name.startswith("fine-tuned"):
                label = "dense" if name == "none" else name
                axis.axhline(mean(rows, "test"), linestyle="--", color="gray", label=label)
                continue
            seconds = max(mean(rows, "seconds"), 0.1)
            axis.plot(seconds, mean(rows, "test"), _mark(name), label=name)
        axis.set(title=net, xlabel="seconds in all", ylabel=y, xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _mark(name: str) -> str:
    if name.endswith(", laws"):
        return "s"
    return "o" if name.endswith(", pairs") or name.startswith(("pairs", "all pairs")) else "^"


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line; write tables and pictures beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    tables = {"maps": maps_table, "domain_shift": shift_table}
    units = {"maps": "accuracy, or 100 x cosine", "domain_shift": "accuracy, %"}
    done = 0
    for name, table in tables.items():
        payload = read_json(args.folder / f"{name}.json")
        if not payload.get("rows"):
            continue
        done += 1
        text = table(payload)
        (args.folder / f"{name}.md").write_text(text + "\n")
        picture(by_method(payload), args.folder / f"{name}.png", y=units[name])
        print(text)
    if not done:
        raise SystemExit("there are no rows: run maps.py or domain_shift.py first.")


if __name__ == "__main__":
    main()
