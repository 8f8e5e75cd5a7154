"""Turn the results of `depth_criteria.py` into tables and a picture; nothing is measured here."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import markdown, read_json

RESULTS = Path(__file__).resolve().parent / "results" / "depth_criteria.json"
REPAIRS = {"none": "unrepaired", "default": "repaired"}
MEASURES = {"loss_change": "loss", "accuracy_change": "accuracy", "output_error": "output"}
EVERY = "all networks"
FIRST, LEVEL = ("transport", "loss_delta"), 0.8  # what the docstring of the benchmark expects
COMMAND = "python benchmarks/depth_criteria.py --data DATA"


@dataclass(frozen=True)
class Score:
    """How well one criterion ranks the blocks of one network, over its seeds.

    Args:
        net: the network, or `all networks` for the mean over them.
        kind: the criterion.
        repair: `none` or `default`.
        measure: the change that it is compared with.
        values: Spearman's rank correlation, one per seed.
    """

    net: str
    kind: str
    repair: str
    measure: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Average over the seeds."""
        return statistics.mean(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Bracket the mean by a 95 % bootstrap over the seeds."""
        return bootstrap(self.values)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlate ranks, ties at their mean rank.

    Args:
        x: numbers.
        y: as many numbers.

    Returns:
        from -1 to 1; None where all of one side are equal, or fewer than two are given.
    """
    from scipy.stats import rankdata

    first, second = (rankdata(v) - (len(v) + 1) / 2 for v in (x, y))
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale > 0 else None


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Bracket a mean by the 2.5 and 97.5 % quantiles of the means of resamples.

    Args:
        values: at least one; up to five are resampled in every possible way, which with three
            comes to their range.

    Returns:
        the bracket.
    """
    if len(values) <= 5:
        draws = np.array(list(itertools.product(values, repeat=len(values))))
    else:
        draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(draws.mean(axis=1), [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def chance(blocks: int) -> float:
    """Find the correlation that one random order in twenty reaches.

    Args:
        blocks: how many are ranked, at least two.

    Returns:
        from 100 000 random orders.
    """
    place, generator = np.arange(blocks) - (blocks - 1) / 2, np.random.default_rng(0)
    orders = generator.permuted(np.tile(place, (100_000, 1)), axis=1)
    return float(np.quantile(orders @ place / (place @ place), 0.95))


def blocks_of(payload: Mapping[str, Any]) -> dict[str, list[str]]:
    """List every network's removable blocks."""
    dense = [row for row in payload.get("rows", ()) if row["side"] == "dense" and "blocks" in row]
    return {row["net"]: row["blocks"] for row in dense}


def summarise(payload: Mapping[str, Any]) -> list[Score]:
    """Correlate every criterion with what really happened, seed by seed.

    Args:
        payload: what `depth_criteria.py` wrote.

    Returns:
        one entry per network, criterion, repair and measure that was measured on all blocks, and
        the mean over the networks where a criterion has them all.
    """
    found: dict[tuple[str, str, str, str], dict[int, float]] = defaultdict(dict)
    for key, seed, value in _correlations(payload):
        found[key][seed] = value
    nets = {net for net, *_ in found}
    own = [Score(*key, tuple(each[s] for s in sorted(each))) for key, each in found.items()]
    for rest in dict.fromkeys(key[1:] for key in found):
        across = [found.get((net, *rest), {}) for net in nets]
        seeds = sorted(set.intersection(*(set(each) for each in across)))
        if seeds and len(nets) > 1:
            means = tuple(statistics.mean(each[seed] for each in across) for seed in seeds)
            own.append(Score(EVERY, *rest, means))
    return own


def _correlations(
    payload: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, str, str, str], int, float]]:
    rows = [row for row in payload.get("rows", ()) if "error" not in row]
    truth: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in (r for r in rows if r["side"] == "truth"):
        truth[row["net"], row["seed"], row["repair"]][row["block"]] = row
    blocks = blocks_of(payload)
    for row in (r for r in rows if r["side"] == "score"):
        net, names = row["net"], blocks.get(row["net"], [])
        for repair, measure in itertools.product(REPAIRS, MEASURES):
            real = truth[net, row["seed"], repair]
            if not names or set(real) != set(names):
                continue
            happened = [real[name][measure] for name in names]
            value = spearman([row["scores"][name] for name in names], happened)
            if value is not None:
                yield (net, row["choice"], repair, measure), row["seed"], value


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    low, high = score.interval
    return f"{score.mean:.2f}" + (f" [{low:.2f}, {high:.2f}]" if len(score.values) > 1 else "")


def table(payload: Mapping[str, Any]) -> str:
    """Write the correlations in markdown.

    Args:
        payload: what `depth_criteria.py` wrote.

    Returns:
        one row per network and criterion; within a network by the unrepaired loss.
    """
    scores = {(s.net, s.kind, s.repair, s.measure): s for s in summarise(payload)}
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in payload.get("rows", ()):
        if row["side"] == "score" and "seconds" in row:
            took[row["net"], row["choice"]].append(row["seconds"])
    nets = [EVERY] if any(net == EVERY for net, *_ in scores) else []
    lines = []
    for net in [*nets, *blocks_of(payload)]:
        kinds = {kind for n, kind, *_ in scores if n == net} | {k for n, k in took if n == net}

        def place(kind: str, net: str = net) -> tuple[float, str]:
            own = scores.get((net, kind, "none", "loss_change"))
            return (-own.mean if own else 2.0), kind

        for kind in sorted(kinds, key=place):
            columns = itertools.product(REPAIRS, MEASURES)
            seconds = took.get((net, kind))
            cells = [_cell(scores.get((net, kind, *column))) for column in columns]
            lines.append([net, kind, *cells, f"{statistics.mean(seconds):.1f}" if seconds else ""])
    head = [f"{said}: {name}" for said in REPAIRS.values() for name in MEASURES.values()]
    return markdown(["network", "criterion", *head, "s"], lines)


def verdict(payload: Mapping[str, Any]) -> str:
    """Say whether what was expected came true.

    Args:
        payload: what `depth_criteria.py` wrote.

    Returns:
        sentences.
    """
    scores = summarise(payload)
    nets = {s.net for s in scores}
    at = EVERY if EVERY in nets else min(nets, default="")
    said = []
    for repair, word in REPAIRS.items():
        here = [s for s in scores if (s.net, s.repair, s.measure) == (at, repair, "loss_change")]
        here.sort(key=lambda s: (-s.mean, s.kind))
        best = ", ".join(f"`{s.kind}` {s.mean:.2f}" for s in here[:3])
        said.append(f"{word.capitalize()}, the change of the loss is foretold best by {best}.")
        order = [s.kind for s in here]
        if set(FIRST) <= set(order):
            kept = order[0] == FIRST[0]
            if repair == "none":
                kept = set(order[:2]) == set(FIRST) and here[1].mean >= LEVEL
            said.append("This is as expected." if kept else "This is not what was expected.")
    return f"Over {at}: " + " ".join(said) if said and at else ""


def failures(payload: Mapping[str, Any]) -> str:
    """Say which criteria refused a network, and why."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in payload.get("rows", ()):
        if (
            row["side"] == "score"
            and "error" in row
            and row["net"] not in found[row["choice"], row["error"]]
        ):
            found[row["choice"], row["error"]].append(row["net"])
    lines = [
        f"- `{kind}` gives no score on {', '.join(nets)}: {error}"
        for (kind, error), nets in sorted(found.items())
    ]
    return "\n".join(lines)


def facts(payload: Mapping[str, Any]) -> str:
    """Say what was measured: blocks, seeds, held-out samples, and what chance reaches."""
    rows = [row for row in payload.get("rows", ()) if row["side"] == "dense" and "blocks" in row]
    commits = sorted({e.get("commit") or "?" for e in payload.get("environments", {}).values()})
    lines = []
    for net, blocks in blocks_of(payload).items():
        own = [row for row in rows if row["net"] == net]
        lines.append(
            f"- {net}: {len(blocks)} removable blocks, {len(own)} seeds, {own[0]['held_out']} "
            f"held-out samples; one random order in twenty reaches {chance(len(blocks)):.2f}."
        )
    return "\n".join([*lines, f"- Commits: {', '.join(commits)}."])


def report(payload: Mapping[str, Any]) -> str:
    """Write all that is generated of the page.

    Args:
        payload: what `depth_criteria.py` wrote; nothing where it was not run.

    Returns:
        markdown.
    """
    if not payload.get("rows"):
        return f"*Not measured yet.* Run `{COMMAND}` and plot."
    link = "![Rank correlation with the change of the loss](pictures/depth_criteria.png)"
    parts = [verdict(payload), link, facts(payload), failures(payload), table(payload)]
    return "\n\n".join(part for part in parts if part)


def picture(payload: Mapping[str, Any], path: Path) -> None:
    """Draw bars with intervals for the change of the loss, one chart per network.

    Args:
        payload: what `depth_criteria.py` wrote.
        path: where to; the ending decides the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores = [s for s in summarise(payload) if s.measure == "loss_change"]
    blocks = blocks_of(payload)
    nets = [n for n in (*blocks, EVERY) if any(s.net == n for s in scores)]
    if not nets:
        return
    # One order for all charts, best at the top, so that a criterion keeps its line.
    order = {s.kind: s.mean for s in sorted(scores, key=lambda s: (s.net == nets[-1], s.repair))}
    kinds = sorted(order, key=lambda kind: (order[kind], kind))
    size = (4.2 * len(nets), 1.2 + 0.36 * len(kinds))
    figure, axes = pyplot.subplots(1, len(nets), figsize=size, squeeze=False, sharey=True)
    for axis, net in zip(axes[0], nets, strict=True):
        _bars(axis, [s for s in scores if s.net == net], kinds)
        if net in blocks:
            axis.axvline(
                chance(len(blocks[net])), linestyle="--", color="gray", label="chance, 5 %"
            )
        axis.set(title=net, xlabel="rank correlation", xlim=(-1, 1.02))
        axis.grid(alpha=0.3, axis="x")
    axes[0][0].set_yticks(range(len(kinds)), kinds)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axis: Any, scores: Sequence[Score], kinds: Sequence[str]) -> None:
    for shift, (repair, said) in zip((0.19, -0.19), REPAIRS.items(), strict=True):
        here = [s for s in scores if s.repair == repair]
        places = [kinds.index(s.kind) + shift for s in here]
        means = [s.mean for s in here]
        lows = [max(0.0, s.mean - s.interval[0]) for s in here]
        highs = [max(0.0, s.interval[1] - s.mean) for s in here]
        axis.barh(places, means, 0.36, xerr=[lows, highs], capsize=2, label=said)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, write tables and a picture beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    payload = read_json(args.json)
    text = report(payload)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.with_suffix(".md").write_text(text + "\n")
    picture(payload, args.json.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
