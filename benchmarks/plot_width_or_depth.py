"""Turn the results of `width_or_depth.py` into a table and a picture; nothing is measured here."""

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

RESULTS = Path(__file__).resolve().parent / "results" / "width_or_depth.json"
PARTS = {"held_out": "held-out", "test": "test"}
MIXED = "both"
NAMES = {"width": "width only", "depth": "depth only", "both": "both, one budget"}
COMMAND = "python benchmarks/width_or_depth.py --data DATA"
Place = tuple[str, int]  # net, MACs kept at most, in percent


@dataclass(frozen=True)
class Score:
    """One way at one budget, over its seeds.

    Args:
        place: network and budget.
        way: `width`, `depth` or `both`.
        rows: one per seed that met the budget.
        unmet: the library's words where the budget cannot be met; else empty.
    """

    place: Place
    way: str
    rows: tuple[dict[str, Any], ...]
    unmet: str = ""

    def mean(self, name: str) -> float:
        """Average a column over the seeds."""
        return float(statistics.mean(row[name] for row in self.rows))

    def std(self, name: str) -> float:
        """Measure how far the seeds are apart; 0 where there is one."""
        values = [row[name] for row in self.rows]
        return statistics.stdev(values) if len(values) > 1 else 0.0


def summarise(payload: Mapping[str, Any]) -> list[Score]:
    """Gather the seeds of every way at every budget.

    Args:
        payload: what `width_or_depth.py` wrote.

    Returns:
        scores, the largest budget first; rows that failed are left out.
    """
    found: dict[tuple[Place, str], list[dict[str, Any]]] = defaultdict(list)
    for row in payload.get("rows", ()):
        if row["side"] == "ours" and "error" not in row:
            found[(row["net"], 100 - row["removed"]), row["choice"]].append(row)
    scores = []
    for (place, way), rows in found.items():
        met = tuple(row for row in rows if "unmet" not in row)
        words = next((row["unmet"] for row in rows if "unmet" in row), "")
        scores.append(Score(place, way, met, words))
    ways = list(NAMES)
    return sorted(scores, key=lambda s: (s.place[0], -s.place[1], ways.index(s.way)))


def dense_of(payload: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """List every dense network's rows, one per seed."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in payload.get("rows", ()):
        if row["side"] == "dense" and "error" not in row:
            found[row["net"]].append(row)
    return dict(found)


def gap(ours: Score, other: Score, part: str) -> tuple[float, float]:
    """Compare two ways image by image.

    Args:
        ours: a way.
        other: another, of the same network.
        part: `held_out` or `test`.

    Returns:
        the difference of their accuracies in points and its standard error over images, averaged
        over the seeds that both have.

    Raises:
        ValueError: if they have no seed in common.
    """
    means, errors = [], []
    for a in ours.rows:
        for b in (row for row in other.rows if row["seed"] == a["seed"]):
            first, second = int(a[f"{part}_right"], 16), int(b[f"{part}_right"], 16)
            won, lost = (first & ~second).bit_count(), (second & ~first).bit_count()
            count = a[f"{part}_images"]
            mean = (won - lost) / count
            means.append(100 * mean)
            errors.append(100 * (((won + lost) / count - mean**2) / count) ** 0.5)
    if not means:
        raise ValueError(f"{ours.place} {ours.way} and {other.way} share no seed.")
    return statistics.mean(means), statistics.mean(errors)


@dataclass(frozen=True)
class Verdict:
    """Where the mixed plan is behind another way.

    Args:
        compared: how many comparisons at equal budgets there were.
        error: those where its output is further from the dense one's on held-out images.
        accuracy: those where it is less accurate by more than one standard error, by part.
        clock: mixed plans that another way's network beats, by more than one standard error on
            held-out images, in no more time.
        plans: how many mixed plans there are.
    """

    compared: int
    error: tuple[str, ...]
    accuracy: Mapping[str, tuple[str, ...]]
    clock: tuple[str, ...]
    plans: int


def judge(scores: Sequence[Score]) -> Verdict:
    """Find where the mixed plan is behind.

    Args:
        scores: of any number of networks.

    Returns:
        the comparisons that it loses, in words.
    """
    met = [score for score in scores if score.rows]
    mixed = [score for score in met if score.way == MIXED]
    pairs = [(m, s) for m in mixed for s in met if s.way != MIXED and s.place[0] == m.place[0]]
    pairs = [(m, s) for m, s in pairs if _seeds(m) & _seeds(s)]
    equal = [(m, s) for m, s in pairs if m.place == s.place]
    error = [(m, s) for m, s in equal if m.mean("output_error") > s.mean("output_error")]
    behind = {p: [(m, s) for m, s in equal if _behind(m, s, p)] for p in PARTS}
    slower = [
        (m, s)
        for m, s in pairs
        if s.mean("latency") <= m.mean("latency") and _behind(m, s, "held_out")
    ]
    return Verdict(
        compared=len(equal),
        error=tuple(_named(m, s) for m, s in error),
        accuracy={p: tuple(_named(m, s) for m, s in found) for p, found in behind.items()},
        clock=tuple(dict.fromkeys(f"{m.place[0]} at {m.place[1]} %" for m, _ in slower)),
        plans=len(mixed),
    )


def _seeds(score: Score) -> set[int]:
    return {row["seed"] for row in score.rows}


def _behind(mixed: Score, other: Score, part: str) -> bool:
    mean, error = gap(mixed, other, part)
    return mean < -error


def _named(mixed: Score, other: Score) -> str:
    return f"{mixed.place[0]} at {mixed.place[1]} %, {NAMES[other.way]}"


def words(verdict: Verdict) -> str:
    """Say where the mixed plan is behind, and whether that was expected.

    Args:
        verdict: what `judge` found.

    Returns:
        one paragraph per claim.
    """
    claims = [
        ("By the error of the output on held-out images", verdict.error),
        *(
            (f"By accuracy on {said} images, beyond one standard error", verdict.accuracy[part])
            for part, said in PARTS.items()
        ),
    ]
    total = verdict.compared
    lines = [_claim(said, found, f"{total} comparisons at equal MACs") for said, found in claims]
    said = "On the clock, beaten on held-out images by a network that is no slower"
    lines.append(_claim(said, verdict.clock, f"{verdict.plans} mixed plans"))
    kept = not verdict.error and not any(verdict.accuracy.values())
    lines.append(
        "So the mixed plan is never behind at equal MACs, as expected."
        if kept
        else "So the mixed plan is behind in places, which was not expected."
    )
    return "\n".join(f"- {line}" for line in lines)


def _claim(said: str, found: Sequence[str], of: str) -> str:
    where = f": {'; '.join(found)}" if found else ""
    return f"{said}: behind in {len(found)} of {of}{where}."


HEADER = ["network", "MACs budget", "way", "MACs kept", "time / dense", "held-out %", "test %"]
HEADER += ["predicted", "unrepaired", "output error", "blocks gone", "s"]


def _row(score: Score) -> list[str]:
    net, budget = score.place
    head = [net, f"{budget} %", NAMES[score.way]]
    if not score.rows:
        return [*head, f"cannot be met: {score.unmet}", *[""] * (len(HEADER) - 4)]
    gone, most = sorted({len(row["gone"]) for row in score.rows}), score.rows[0]["blocks"]
    return [
        *head,
        f"{score.mean('macs_kept'):.1%}",
        f"{score.mean('latency'):.2f} "
        f"[{score.mean('latency_low'):.2f}, {score.mean('latency_high'):.2f}]",
        _spread(score, "held_out"),
        _spread(score, "test"),
        *(f"{score.mean(name):.1%}" for name in ("predicted", "unrepaired", "output_error")),
        f"{' or '.join(map(str, gone))} of {most}" if most else "–",
        f"{score.mean('seconds'):.1f}",
    ]


def _spread(score: Score, name: str) -> str:
    spread = f" ± {score.std(name):.1f}" if len(score.rows) > 1 else ""
    return f"{score.mean(name):.1f}{spread}"


def table(payload: Mapping[str, Any]) -> str:
    """Write the results in markdown.

    Args:
        payload: what `width_or_depth.py` wrote.

    Returns:
        one row per network, budget and way, the dense networks first.
    """
    dense = [
        [net, "100 %", "dense", "100.0%", "1", _spread(score, "held_out"), _spread(score, "test")]
        for net, rows in sorted(dense_of(payload).items())
        for score in [Score((net, 100), "dense", tuple(rows))]
    ]
    dense = [[*line, *[""] * (len(HEADER) - len(line))] for line in dense]
    return markdown(HEADER, [*dense, *(_row(score) for score in summarise(payload))])


def facts(payload: Mapping[str, Any]) -> str:
    """Say what was measured: seeds, images, commits, and what failed."""
    lines = []
    for net, rows in sorted(dense_of(payload).items()):
        own = [s for s in summarise(payload) if s.place[0] == net and s.rows]
        seeds = max((len(s.rows) for s in own), default=0)
        lines.append(
            f"- {net}: {seeds} calibration seeds, {rows[0]['held_out_images']} held-out and "
            f"{rows[0]['test_images']} test images; {rows[0]['dense_ms']:.0f} ms per dense batch."
        )
    failed = [row for row in payload.get("rows", ()) if "error" in row]
    lines += [
        f"- failed: {r['net']}, {r['choice']} at {100 - r['removed']} %: {r['error']}"
        for r in failed
    ]
    commits = sorted({e.get("commit") or "?" for e in payload.get("environments", {}).values()})
    return "\n".join([*lines, f"- Commits: {', '.join(commits)}."])


def report(payload: Mapping[str, Any]) -> str:
    """Write all that is generated of the page.

    Args:
        payload: what `width_or_depth.py` wrote; nothing where it was not run.

    Returns:
        markdown.
    """
    scores = summarise(payload)
    if not any(score.rows for score in scores):
        return f"*Not measured yet.* Run `{COMMAND}` and plot."
    link = "![Accuracy against measured latency](pictures/width_or_depth.png)"
    return "\n\n".join([words(judge(scores)), link, facts(payload), table(payload)])


def picture(payload: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against latency, one chart per network and part of the images.

    Args:
        payload: what `width_or_depth.py` wrote.
        path: where to; the ending decides the format.
    """
    scores = [score for score in summarise(payload) if score.rows]
    panels = []
    for net, rows in sorted(dense_of(payload).items()):
        own = [score for score in scores if score.place[0] == net]
        for part, said in PARTS.items() if own else ():
            series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
            for score in own:
                point = (score.mean("latency"), score.mean(part), score.std(part))
                series[NAMES[score.way]].append(point)
            level = statistics.mean(row[part] for row in rows)
            panels.append(Panel(f"{net}, {rows[0][f'{part}_images']} {said} images", series, level))
    if panels:
        save_picture(path, panels, x="time of a batch / dense", y="top-1 accuracy, %")


def main(words_: Sequence[str] | None = None) -> None:
    """Read the command line, write a table and a picture beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(words_)
    payload = read_json(args.json)
    text = report(payload)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.with_suffix(".md").write_text(text + "\n")
    picture(payload, args.json.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
