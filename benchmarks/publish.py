"""Write what the committed JSON says into README and docs; nothing is measured here.

python benchmarks/publish.py
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import markdown, read_json
from benchmarks.plot_cifar10_width import Place, Score, best_peers, ratio, summarise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
BLOCK = re.compile(r"(<!-- results: begin.*?-->\n).*?(<!-- results: end -->)", re.DOTALL)
PICTURED = (
    "cifar10_width",
    "cifar10_depth",
    "minilm_depth",
    "scaling",
    "depth_criteria",
    "width_or_depth",
    "maps",
    "domain_shift",
    "generator",
    "methods_cifar10",
    "mpc",
    "weights_mlp_cifar",
    "space_folds",
    "convex_refit",
    "convex_refit_attacks",
    "dtp_cifar10",
)
OURS = {
    "default": "transport/all/budget/least_squares",
    "reconstruct": "transport/all/budget/reconstruct",
}


def short_table(payload: Mapping[str, Any]) -> str:
    """Set the best peer beside our default and our slow repair, one line per net and budget.

    Args:
        payload: what `cifar10_width.py` wrote.

    Returns:
        a markdown table.
    """
    best = best_peers(payload)
    ours = {(s.place, s.method): s for s in summarise(payload) if s.side == "ours"}
    rows = []
    for place in sorted(best):
        found = [ours.get((place, method)) for method in OURS.values()]
        if any(found):
            rows.append(_row(place, best, found))
    head = ["network, stage", "MACs kept", "dense", "best peer", *(f"ours, {n}" for n in OURS)]
    return markdown([*head, "our loss / best peer's"], rows)


def _row(place: Place, best: Mapping[Place, Score], found: list[Score | None]) -> list[str]:
    net, epochs, budget = place
    peer = best[place]
    shares = [f"{share:.2f}" for s in found if s and (share := ratio(s, best)) is not None]
    return [
        net + (f", {epochs:g} epoch of tuning" if epochs else ", one shot"),
        f"{budget} %",
        f"{peer.dense:.1f}",
        f"{_cell(peer)} ({peer.method.split('/')[0]})",
        *(_cell(s) if s else "–" for s in found),
        ", ".join(shares),
    ]


def _cell(score: Score) -> str:
    return f"{score.mean:.1f}" + (f" ± {score.std:.1f}" if score.seeds > 1 else "")


def readme(text: str, payload: Mapping[str, Any]) -> str:
    """Fill the results block of the README.

    Args:
        text: the README.
        payload: what `cifar10_width.py` wrote.

    Returns:
        the README with today's table.
    """
    known = (env.get("commit") for env in payload["environments"].values())
    commits = sorted(commit for commit in set(known) if commit)
    note = (
        "Top-1 in percent on images that nothing was tuned on, mean ± standard deviation over "
        "calibration seeds; 1 024 unlabelled images, no training, but where an epoch is named. "
        "The best peer is the best of those of Torch-Pruning's importances and settings that were "
        "run, with batch-norm re-estimation, chosen on the test images in its favour. Made by "
        f"`benchmarks/cifar10_width.py` at {', '.join(commits)}; every row is on "
        "the benchmarks page of the documentation.\n"
    )
    return BLOCK.sub(lambda m: f"{m[1]}{short_table(payload)}\n\n{note}{m[2]}", text)


def main() -> None:
    """Publish everything that is there."""
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(), read_json(RESULTS / "cifar10_width.json")))
    for name in PICTURED:
        if (RESULTS / f"{name}.png").exists():
            shutil.copyfile(RESULTS / f"{name}.png", PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
