"""Is a cut as dear as its price says, once later layers have been refitted around it?

One group at a time is cut to the flagship's width at 50 % of the MACs and repaired by least
squares. The price is the predicted squared change of the output, as a share of its power; what
really happens is read on training images that calibration did not draw.

Expected: measured and predicted agree within a factor of two in every group.

    python benchmarks/methods_prices.py --data DATA
    python benchmarks/methods_prices.py --quick --out /tmp/prices.json
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cifar10_width import load_bench
from benchmarks.common import environment, markdown, write_json
from benchmarks.methods import FLAGSHIP, OURS, methods
from benchmarks.methods_cifar10 import NET, Case, Lab, logits, quick_bench

OUT = Path(__file__).resolve().parent / "results" / "methods_prices.json"


def alone(lab: Lab, case: Case, cut: Any) -> nn.Module:
    """Cut one group of a plan, and repair."""
    from torch_otprune.pipeline import repair_
    from torch_otprune.surgery import cut_

    plan, graph = lab.plan(case)[0], lab.observed(case)[1]
    small = copy.deepcopy(lab.bench.model)
    cut_(small, [cut])
    repair_(small, lab.bench.model, graph, plan.model_copy(update={"cuts": (cut,)}),
            lab.batches(case.seed))  # fmt: skip
    return small


def measure(lab: Lab, seed: int, budget: int) -> Iterator[dict[str, Any]]:
    """Cut every group of the flagship's plan alone.

    Args:
        lab: the network.
        seed: of the calibration draw.
        budget: percent of the MACs.

    Yields:
        one row per group, in order of execution: predicted and measured share of the output's
        power.
    """
    case = Case(methods()[FLAGSHIP], OURS, "budget", budget, seed)
    images = lab.judges("validation", seed)
    dense = logits(lab.bench.model, images)
    for cut in lab.plan(case)[0].cuts:
        start = time.process_time()
        moved = logits(alone(lab, case, cut), images) - dense
        measured = float(moved.square().sum() / dense.square().sum())
        assert cut.error is not None
        yield {
            "group": cut.group,
            "units": cut.units,
            "kept": len(cut.keep),
            "predicted": round(cut.error**2, 6),
            "measured": round(measured, 6),
            "seed": seed,
            "cpu_seconds": round(time.process_time() - start, 2),
        }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows in markdown."""
    cells = [_row(row) for row in rows]
    return markdown(["group, cut alone", "kept", "predicted", "measured", "ratio"], cells)


def _row(row: Mapping[str, Any]) -> list[str]:
    ratio = row["measured"] / max(row["predicted"], 1e-12)
    shares = [f"{row[name]:.2%}" for name in ("predicted", "measured")]
    return [row["group"], f"{row['kept']} of {row['units']}", *shares, f"{ratio:.2f}"]


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--images", type=int, default=1250, help="that judge a network")
    parser.add_argument("--quick", action="store_true", help="a tiny network, random images")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    if args.data is None and not args.quick:
        parser.error("--data is required, but with --quick.")
    bench = quick_bench() if args.quick else load_bench(NET, args.data, args.data)
    question = (__doc__ or "").split("\n\n    ")[0]
    found = {"question": question, "environment": environment(args.seed), "images": args.images}
    rows: list[dict[str, Any]] = []
    for row in measure(Lab(bench, images=args.images), args.seed, args.budget):
        rows.append(row)
        print(row, flush=True)
        write_json(args.out, {**found, "budget": args.budget, "rows": rows})
        args.out.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
