"""Turn the results of `cifar10_width.py` into a table and a picture; nothing is measured here."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Panel, markdown, read_json, save_picture

RESULTS = Path(__file__).resolve().parent / "results" / "cifar10_width.json"
Place = tuple[str, float, int]  # net, epochs of fine-tuning, budget in percent


@dataclass(frozen=True)
class Score:
    """One method at one place, over its seeds.

    Args:
        place: network, epochs, budget.
        side: `peer` or `ours`.
        method: criterion/groups/widths/repair.
        mean: of the accuracy, percent.
        std: between seeds; 0 where there is one.
        seeds: how many.
        dense: accuracy of the dense network, percent.
        macs: share of the dense MACs kept.
        seconds: mean time to prune and repair.
        peak_mib: highest resident memory.
        labels: whether labels were seen.
    """

    place: Place
    side: str
    method: str
    mean: float
    std: float
    seeds: int
    dense: float
    macs: float
    seconds: float
    peak_mib: float
    labels: bool

    @property
    def loss(self) -> float:
        """Subtract from the dense accuracy, in points."""
        return self.dense - self.mean


def summarise(payload: Mapping[str, Any]) -> list[Score]:
    """Average every method over its seeds.

    Args:
        payload: what `cifar10_width.py` wrote.

    Returns:
        one score per place and method; rows that failed are left out.
    """
    rows = [row for row in payload.get("rows", ()) if "accuracy" in row]
    dense = {r["net"]: r["accuracy"] for r in rows if r["side"] == "dense" and not r["epochs"]}
    cells: dict[tuple[Place, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["side"] != "dense" and row["net"] in dense:
            place = (row["net"], row["epochs"], row["budget"])
            cells[place, row["side"], row["method"]].append(row)
    return [_score(key, found, dense[key[0][0]]) for key, found in cells.items()]


def _score(key: tuple[Place, str, str], rows: Sequence[dict[str, Any]], dense: float) -> Score:
    read = {n: [row[n] for row in rows] for n in ("accuracy", "macs_kept", "seconds", "peak_mib")}
    accuracy = read["accuracy"]
    return Score(
        *key,
        mean=statistics.mean(accuracy),
        std=statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
        seeds=len(accuracy),
        dense=dense,
        macs=max(read["macs_kept"]),
        seconds=statistics.mean(read["seconds"]),
        peak_mib=max(read["peak_mib"]),
        labels=rows[0]["labels"],
    )


def best_of(scores: Iterable[Score]) -> dict[Place, Score]:
    """Take the most accurate method of every place."""
    best: dict[Place, Score] = {}
    for score in scores:
        if score.place not in best or score.mean > best[score.place].mean:
            best[score.place] = score
    return best


def best_peers(payload: Mapping[str, Any]) -> dict[Place, Score]:
    """Choose the peer to beat at every place, on the test images themselves: in its favour."""
    return best_of(s for s in summarise(payload) if s.side == "peer")


def ratio(score: Score, best: Mapping[Place, Score]) -> float | None:
    """Divide a method's accuracy loss by the best peer's; below 1 is better than any peer."""
    peer = best.get(score.place)
    return score.loss / peer.loss if peer and peer.loss > 0 else None


def _row(score: Score, best: Mapping[Place, Score]) -> list[str]:
    net, epochs, budget = score.place
    against = ratio(score, best)
    spread = f" ± {score.std:.1f}" if score.seeds > 1 else ""
    return [
        net + (f" + {epochs:g} epoch" if epochs else ""),
        f"{budget} %",
        score.side,
        score.method + (" (labels)" if score.labels else ""),
        f"{score.mean:.1f}{spread}",
        f"{score.loss:.1f}",
        "–" if against is None else f"{against:.2f}",
        f"{score.macs:.1%}",
        f"{score.seconds:.1f}",
        f"{score.peak_mib:.0f}",
    ]


HEADER = ["net", "budget", "side", "criterion/groups/widths/repair", "top-1 %", "loss"]
HEADER += ["loss / best peer", "MACs kept", "s", "peak MiB"]


def table(payload: Mapping[str, Any], *, every: bool = False) -> str:
    """Write the results in markdown.

    Args:
        payload: what `cifar10_width.py` wrote.
        every: all methods; otherwise the best peer and all of ours.

    Returns:
        a table, best first within each network and budget.
    """
    scores, best = summarise(payload), best_peers(payload)
    peers = [s for s in scores if s.side == "peer"] if every else list(best.values())
    shown = [*peers, *(s for s in scores if s.side == "ours")]
    shown.sort(key=lambda s: (s.place, -s.mean, s.method))
    return markdown(HEADER, [_row(score, best) for score in shown])


def picture(payload: Mapping[str, Any], path: Path, *, methods: Sequence[str]) -> None:
    """Draw accuracy over MACs kept, one chart per network and stage.

    Args:
        payload: what `cifar10_width.py` wrote.
        path: where to.
        methods: ours to draw; the best peer is always drawn.
    """
    scores = summarise(payload)
    best = list(best_peers(payload).values())
    shown = [("best peer", s) for s in best]
    shown += [(s.method, s) for s in scores if s.side == "ours" and s.method in methods]
    stages = sorted({score.place[:2] for _, score in shown})
    here = [[(label, s) for label, s in shown if s.place[:2] == stage] for stage in stages]
    panels = [_panel(found) for found in here]
    if panels:
        save_picture(path, panels, x="MACs kept, %", y="top-1 accuracy, %")


def _panel(shown: Sequence[tuple[str, Score]]) -> Panel:
    series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for label, score in shown:
        series[label].append((score.place[2], score.mean, score.std))
    (net, epochs, _), level = shown[0][1].place, shown[0][1].dense
    return Panel(f"{net}, {f'+ {epochs:g} epoch' if epochs else 'one shot'}", series, level)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, write a table and a picture beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--every", action="store_true", help="all peers, not the best alone")
    drawn = ["transport/all/budget/least_squares", "transport/all/budget/reconstruct"]
    drawn += ["transport/inner/uniform/least_squares", "magnitude/inner/uniform/norm"]
    parser.add_argument("--methods", nargs="*", default=drawn, help="of ours, in the picture")
    args = parser.parse_args(words)
    payload = read_json(args.json)
    if not payload.get("rows"):
        raise SystemExit(f"{args.json.name} has no rows: run cifar10_width.py first.")
    text = table(payload, every=args.every)
    args.json.with_suffix(".md").write_text(text + "\n")
    picture(payload, args.json.with_suffix(".png"), methods=args.methods)
    print(text)


if __name__ == "__main__":
    main()
