"""Width or depth: which removal keeps more accuracy for the time a network takes?

ResNet-20 and ResNet-32 are brought to 80, 70, 60, 50 and 40 % of their MACs by removing channels
only, blocks only, or both under one budget, without training, from 1 024 unlabelled images.

Expected before measuring: at every budget the mixed plan is never behind the better of the other
two, by the error of the output on held-out images and, within one standard error over images, by
accuracy. With less than one block's MACs to remove, only width can hit a budget closely.

    python benchmarks/width_or_depth.py --data DATA
    python benchmarks/width_or_depth.py --quick --out /tmp/width_or_depth.json
    python benchmarks/plot_width_or_depth.py

Rows are written one by one and skipped when they are there already. `removed` is the share of the
MACs that had to go, in percent.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar, cifar10_depth
from benchmarks.common import count_macs, count_params, measured
from benchmarks.depth_criteria import Grade, Images, grade
from benchmarks.depth_harness import Cell, Spec, paired_latency, run

OUT = Path(__file__).resolve().parent / "results" / "width_or_depth.json"
SEEDS = {"resnet20": 3, "resnet32": 1}
BUDGETS = "80,70,60,50,40"
ROUNDS, BATCH = 31, 64
WAYS = ("width", "depth", "both")


@dataclass
class Bench:
    """One network with its images.

    Args:
        net: its name in the results.
        model: dense.
        data: calibration images, and others of the training images to compare plans on.
        test: for the final accuracy only.
        rounds: of the clock.
    """

    net: str
    model: nn.Module
    data: Images
    test: cifar.Split
    rounds: int = ROUNDS
    dense: dict[int, Grade] = field(default_factory=dict)

    def before(self, seed: int) -> Grade:
        """Judge the dense network on the seed's held-out images."""
        if seed not in self.dense:
            self.dense[seed] = self.data.grade(self.model, seed)
        return self.dense[seed]

    @cached_property
    def batch(self) -> Tensor:
        """Take what is timed."""
        return self.test.pick(torch.arange(min(BATCH, len(self.test)))).inputs()

    def clock(self, small: nn.Module) -> dict[str, float]:
        """Time a network beside the dense one, round by round in one process."""
        batch = self.batch
        return paired_latency(self.model, small, lambda m: m(batch), rounds=self.rounds)


def load_bench(net: str, data: Path) -> Bench:
    """Load a network of `cifar.NETS` with the images it was trained for."""
    loaded = cifar10_depth.load_bench(net, data)
    return Bench(net, loaded.model, Images(loaded.train), loaded.test)


def quick_bench() -> Bench:
    """Build a tiny untrained network and random images, to try the harness without data."""
    tiny = cifar10_depth.quick_bench()
    return Bench(tiny.net, tiny.model, Images(tiny.train, tiny.samples), tiny.test, rounds=2)


def policy_of(way: str, *, removed: int, samples: int, seed: int) -> Any:
    """Say in the library's words what may go.

    Args:
        way: `width`, `depth` or `both`; all with their default criteria and repairs.
        removed: share of the MACs that must go, in percent.
        samples: calibration images.
        seed: of every random choice.

    Returns:
        the policy.
    """
    import torch_otprune as otp

    rules: dict[str, list[otp.Channels | otp.Layers]] = {
        "width": [otp.Channels()],
        "depth": [otp.Layers()],
        "both": [otp.Layers(), otp.Channels()],
    }
    return otp.Policy(
        rules=rules[way],
        budget=otp.Budget(macs=f"{100 - removed}%"),
        calibration=otp.Calibration(samples=samples),
        seed=seed,
    )


def measure(bench: Bench, way: str, *, removed: int, seed: int) -> dict[str, Any]:
    """Prune to a budget and read accuracy, errors and time.

    Args:
        bench: the network with its images.
        way: `none` for the dense network, or one of `WAYS`.
        removed: share of the MACs that must go, in percent.
        seed: of the calibration images, and of what is held out.

    Returns:
        plain JSON values; only `unmet`, the library's words, where the budget cannot be met. Errors
        are shares of the dense output's RMS: `predicted` by the plan before repair, from the
        squares of all its cuts and drops; `unrepaired` as measured on calibration images;
        `output_error` after repair, on held-out images.
    """
    import torch_otprune as otp
    from torch_otprune.errors import BudgetError

    small, extra = bench.model, dict[str, Any]()
    if way != "none":
        small, batches = copy.deepcopy(bench.model), bench.data.calibration(seed)
        samples = sum(map(len, batches))
        policy = policy_of(way, removed=removed, samples=samples, seed=seed)
        with measured() as took:
            try:
                report = otp.prune_(small, policy, batches, timing=0)
            except BudgetError as error:
                return {"unmet": str(error).splitlines()[0], "shown": "unmet"}
        plan = report.plan
        squares = [*(cut.error**2 for cut in plan.cuts), *(drop.error**2 for drop in plan.drops)]
        extra = {
            "predicted": round(sum(squares) ** 0.5, 6),
            "unrepaired": round(report.output_error.before_repair, 6),
            "gone": [drop.block for drop in plan.drops],
            "blocks": plan.layers.before,
            "cut_groups": len(plan.cuts),
            "seconds": round(took.seconds, 3),
            "peak_mib": round(took.peak_mib, 1),
        }
    return _read(bench, small, seed) | extra | bench.clock(small)


def _read(bench: Bench, small: nn.Module, seed: int) -> dict[str, Any]:
    """Judge a network on held-out and on test images."""
    before, held, test = bench.before(seed), bench.data.grade(small, seed), grade(small, bench.test)
    example = bench.batch[:1]
    return {
        "held_out": round(held.accuracy, 4),
        "held_out_images": len(held.right),
        "held_out_right": cifar10_depth.hexed(held.right),
        "test": round(test.accuracy, 4),
        "test_images": len(test.right),
        "test_right": cifar10_depth.hexed(test.right),
        "output_error": round(held.error(before), 6),
        "macs_kept": round(count_macs(small, example) / count_macs(bench.model, example), 4),
        "params_kept": round(count_params(small) / count_params(bench.model), 4),
        "shown": round(held.accuracy, 2),
    }


def cells(
    bench: Bench, ways: Sequence[str], budgets: Sequence[int], *, seeds: int
) -> Iterator[Cell]:
    """List the cells of one network, seed by seed, so that a run cut short compares like with like.

    Args:
        bench: the network with its images.
        ways: of `WAYS`.
        budgets: MACs kept, in percent.
        seeds: how many.

    Yields:
        cells.
    """
    for seed in range(seeds):
        work = partial(measure, bench, "none", removed=0, seed=seed)
        yield Cell(bench.net, Spec("dense"), 0, seed, work)
        for budget in budgets:
            for way in ways:
                gone = 100 - budget
                work = partial(measure, bench, way, removed=gone, seed=seed)
                yield Cell(bench.net, Spec("ours", way, "default"), gone, seed, work)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--nets", nargs="+", choices=list(SEEDS), default=list(SEEDS))
    parser.add_argument("--budgets", default=BUDGETS, help="MACs kept, in percent")
    parser.add_argument("--seeds", type=int, help="default: 3 for resnet20, 1 for resnet32")
    parser.add_argument("--which", default=",".join(WAYS), help="of width, depth, both")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="random data, tiny network, no claim")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    args = parser.parse_args(words)
    if not args.quick and args.data is None:
        parser.error("--data is needed, or --quick.")
    torch.set_num_threads(args.threads)
    budgets, ways = [int(word) for word in args.budgets.split(",")], args.which.split(",")
    question = (__doc__ or "").split("\n\n    ")[0]
    for bench in [quick_bench()] if args.quick else (load_bench(n, args.data) for n in args.nets):
        seeds = args.seeds or SEEDS.get(bench.net, 1)
        run(cells(bench, ways, budgets, seeds=seeds), args.out, question=question, force=args.force)


if __name__ == "__main__":
    main()
