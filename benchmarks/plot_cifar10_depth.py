"""Turn the results of `cifar10_depth.py` into a table and a picture; nothing is measured here."""

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

RESULTS = Path(__file__).resolve().parent / "results" / "cifar10_depth.json"
Place = tuple[str, int]  # net, blocks removed


@dataclass(frozen=True)
class Score:
    """One method at one depth, over its seeds.

    Args:
        place: network and number of blocks removed.
        side: `baseline` or `ours`.
        method: choice/repair.
        mean: of the accuracy, percent.
        std: between seeds; 0 where there is one.
        dense: accuracy of the dense network, percent.
        rows: one per seed.
    """

    place: Place
    side: str
    method: str
    mean: float
    std: float
    dense: float
    rows: tuple[dict[str, Any], ...]

    @property
    def loss(self) -> float:
        """Subtract from the dense accuracy, in points."""
        return self.dense - self.mean

    def average(self, name: str) -> float:
        """Average a column over the seeds."""
        return float(statistics.mean(row[name] for row in self.rows))


def summarise(payload: Mapping[str, Any]) -> list[Score]:
    """Average every method over its seeds.

    Args:
        payload: what `cifar10_depth.py` wrote.

    Returns:
        one score per place and method; rows that failed are left out.
    """
    rows = [row for row in payload.get("rows", ()) if "accuracy" in row]
    dense = {row["net"]: row["accuracy"] for row in rows if row["side"] == "dense"}
    found: dict[tuple[Place, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["side"] != "dense" and row["net"] in dense:
            found[(row["net"], row["removed"]), row["side"], row["method"]].append(row)
    return [_score(key, each, dense[key[0][0]]) for key, each in found.items()]


def _score(key: tuple[Place, str, str], rows: list[dict[str, Any]], dense: float) -> Score:
    read = [row["accuracy"] for row in rows]
    std = statistics.stdev(read) if len(read) > 1 else 0.0
    return Score(*key, statistics.mean(read), std, dense, tuple(rows))


def best(scores: Sequence[Score], side: str) -> dict[Place, Score]:
    """Take the most accurate method of a side at every depth, chosen on the test images."""
    found: dict[Place, Score] = {}
    for score in scores:
        if score.side == side and (
            score.place not in found or score.mean > found[score.place].mean
        ):
            found[score.place] = score
    return found


def ratio(score: Score, against: Mapping[Place, Score]) -> float | None:
    """Divide a method's loss by the best baseline's; below 1 is better than every baseline."""
    base = against.get(score.place)
    return score.loss / base.loss if base and base.loss > 0 else None


def paired(ours: Score, base: Score) -> tuple[float, float]:
    """Compare two methods image by image.

    Args:
        ours: a method.
        base: another at the same place.

    Returns:
        the difference of their accuracies in points and its standard error over test images,
        averaged over the seeds that both have.
    """
    pairs = [(a, b) for a in ours.rows for b in base.rows if a["seed"] == b["seed"]]
    means, errors = [], []
    for a, b in pairs:
        first, second, count = int(a["right"], 16), int(b["right"], 16), a["test_images"]
        won, lost = (first & ~second).bit_count(), (second & ~first).bit_count()
        mean = (won - lost) / count
        means.append(100 * mean)
        errors.append(100 * (((won + lost) / count - mean**2) / count) ** 0.5)
    return (statistics.mean(means), statistics.mean(errors)) if pairs else (0.0, 0.0)


HEADER = ["net", "removed", "side", "choice/repair", "top-1 %", "loss", "loss / best baseline"]
HEADER += ["minus best baseline, paired", "MACs kept", "time / dense", "s"]


def _row(score: Score, against: Mapping[Place, Score]) -> list[str]:
    share, base = ratio(score, against), against.get(score.place)
    spread = f" ± {score.std:.1f}" if len(score.rows) > 1 else ""
    gap, error = paired(score, base) if base and base is not score else (0.0, 0.0)
    return [
        score.place[0],
        f"{score.place[1]} of {score.rows[0]['blocks']}",
        score.side,
        score.method,
        f"{score.mean:.1f}{spread}",
        f"{score.loss:.1f}",
        "–" if share is None else f"{share:.2f}",
        f"{gap:+.1f} ± {error:.1f}" if error else "–",
        f"{score.average('macs_kept'):.1%}",
        f"{score.average('latency'):.2f}",
        f"{score.average('seconds'):.1f}",
    ]


def table(payload: Mapping[str, Any], *, every: bool = False) -> str:
    """Write the results in markdown.

    Args:
        payload: what `cifar10_depth.py` wrote.
        every: all baselines; otherwise the best one and all of ours.

    Returns:
        a table, best first at every depth.
    """
    scores = summarise(payload)
    against = best(scores, "baseline")
    shown = [s for s in scores if every or s.side == "ours" or s is against.get(s.place)]
    shown.sort(key=lambda s: (s.place, -s.mean, s.method))
    return markdown(HEADER, [_row(score, against) for score in shown])


def picture(payload: Mapping[str, Any], path: Path, *, over: str, ours: str) -> None:
    """Draw accuracy, one chart per network: ours, and the best repair of every baseline choice.

    Args:
        payload: what `cifar10_depth.py` wrote.
        path: where to.
        over: the horizontal axis, `removed` or `latency`.
        ours: which of our methods.
    """
    scores = [s for s in summarise(payload) if s.side == "baseline" or s.method == ours]
    drawn: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    levels: dict[str, float] = {}
    for (net, _, label), score in sorted(_lines(scores).items()):
        x = float(score.place[1]) if over == "removed" else score.average("latency")
        drawn.setdefault(net, {}).setdefault(label, []).append((x, score.mean, score.std))
        levels[net] = score.dense
    if panels := [Panel(net, series, levels[net]) for net, series in drawn.items()]:
        names = {"removed": "blocks removed", "latency": "time of a batch / dense"}
        save_picture(path, panels, x=names[over], y="top-1 accuracy, %")


def _lines(scores: Sequence[Score]) -> dict[tuple[str, int, str], Score]:
    lines: dict[tuple[str, int, str], Score] = {}
    for score in sorted(scores, key=lambda s: s.mean):  # the best comes last and stays
        choice = score.method.split("/")[0]
        label = "ours" if score.side == "ours" else f"{choice}, best repair"
        lines[score.place[0], score.place[1], label] = score
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, write a table and two pictures beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--every", action="store_true", help="all baselines, not the best alone")
    parser.add_argument("--ours", default="transport/affine+least_squares", help="in the picture")
    args = parser.parse_args(words)
    payload = read_json(args.json)
    if not payload.get("rows"):
        raise SystemExit(f"{args.json.name} has no rows: run cifar10_depth.py first.")
    text = table(payload, every=args.every)
    args.json.with_suffix(".md").write_text(text + "\n")
    stem = args.json.with_suffix("")
    picture(payload, stem.with_suffix(".png"), over="removed", ours=args.ours)
    picture(
        payload,
        stem.with_name(f"{stem.name}_latency").with_suffix(".png"),
        over="latency",
        ours=args.ours,
    )
    print(text)


if __name__ == "__main__":
    main()
