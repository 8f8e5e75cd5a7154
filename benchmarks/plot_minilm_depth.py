"""Turn the results of `minilm_depth.py` into a table and a picture; nothing is measured here."""

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

RESULTS = Path(__file__).resolve().parent / "results" / "minilm_depth.json"


@dataclass(frozen=True)
class Score:
    """One method at one depth.

    Args:
        removed: layers.
        side: `baseline` or `ours`.
        method: choice/repair.
        rows: one per seed.
    """

    removed: int
    side: str
    method: str
    rows: tuple[dict[str, Any], ...]

    def average(self, name: str) -> float:
        """Average a column over the seeds."""
        return float(statistics.mean(row[name] for row in self.rows))

    def spread(self, name: str) -> float:
        """Take a column's standard deviation over the seeds; 0 where there is one."""
        found = [row[name] for row in self.rows]
        return statistics.stdev(found) if len(found) > 1 else 0.0

    @property
    def loss(self) -> float:
        """Subtract the mean cosine from the dense model's, which is 1."""
        return 1 - self.average("cosine")


def summarise(payload: Mapping[str, Any]) -> list[Score]:
    """Gather the rows of every method; those that failed are left out."""
    found: dict[tuple[int, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in payload.get("rows", ()):
        if "cosine" in row and row["side"] != "dense":
            found[row["removed"], row["side"], row["method"]].append(row)
    return [Score(*key, tuple(rows)) for key, rows in found.items()]


def best(scores: Sequence[Score]) -> dict[int, Score]:
    """Take the most faithful baseline at every depth, chosen on the test texts: in its favour."""
    found: dict[int, Score] = {}
    for score in sorted(scores, key=lambda s: -s.loss):
        if score.side == "baseline":
            found[score.removed] = score
    return found


HEADER = ["removed", "side", "choice/repair", "cosine to dense", "loss / best baseline"]
HEADER += ["top-1 %", "top-10 %", "time / dense", "texts read", "s"]


def _row(score: Score, against: Mapping[int, Score]) -> list[str]:
    base = against.get(score.removed)
    spread = f" ± {score.spread('cosine'):.4f}" if len(score.rows) > 1 else ""
    return [
        f"{score.removed} of {score.rows[0]['layers']}",
        score.side,
        score.method,
        f"{score.average('cosine'):.4f}{spread}",
        f"{score.loss / base.loss:.2f}" if base and base.loss > 0 else "–",
        f"{score.average('top1'):.1f}",
        f"{score.average('top10'):.1f}",
        f"{score.average('latency'):.2f}",
        f"{score.average('samples'):.0f}",
        f"{score.average('seconds'):.1f}",
    ]


def table(payload: Mapping[str, Any]) -> str:
    """Write the results in markdown, best first at every depth."""
    scores = summarise(payload)
    against = best(scores)
    scores.sort(key=lambda s: (s.removed, s.loss, s.method))
    return markdown(HEADER, [_row(score, against) for score in scores])


def picture(payload: Mapping[str, Any], path: Path) -> None:
    """Draw cosine and neighbours over the number of removed layers."""
    panels = []
    for name, scale in (("cosine", 100.0), ("top10", 1.0)):
        series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for score in summarise(payload):
            label = f"ours, {score.method}" if score.side == "ours" else score.method
            point = (scale * score.average(name), scale * score.spread(name))
            series[label].append((float(score.removed), *point))
        panels.append(Panel({"cosine": "cosine", "top10": "10 neighbours"}[name], series, 100.0))
    save_picture(path, panels, x="layers removed, of six", y="agreement with the dense model, %")


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, write a table and a picture beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    payload = read_json(args.json)
    if not payload.get("rows"):
        raise SystemExit(f"{args.json.name} has no rows: run minilm_depth.py first.")
    text = table(payload)
    args.json.with_suffix(".md").write_text(text + "\n")
    picture(payload, args.json.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
