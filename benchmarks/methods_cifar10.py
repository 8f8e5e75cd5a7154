"""Which channel method, with which repair, loses least of a CIFAR-10 ResNet-20 in one shot?

Every registered criterion that needs no training, with no repair, with the repair of its own paper
and with our least squares, at 30, 50 and 70 % of the MACs, from 1 024 unlabelled images. Widths
are chosen four ways, all at the same cost: by our budget, for every method by its own prices; the
same with `Budget(foresee=True)`; the same share of every block's inner channels, as published
recipes do; or those of the flagship, so that only the choice within the layers differs.

Expected: at every budget the flagship `transport` with least squares is within one standard error
of the best; least squares helps every method; no published recipe beats the same method under our
budget with least squares.

    python benchmarks/methods_cifar10.py --data DATA
    python benchmarks/methods_cifar10.py --data DATA --net resnet32 --out RESULTS.json
    python benchmarks/methods_cifar10.py --quick --out /tmp/methods.json
    python benchmarks/plot_methods.py

Images are the JPEG copies with the weights tuned on them (unless `--net` says otherwise): every
fourth of the 10 000 test images, which nothing was tuned on; and as many training images that
calibration did not draw, on which decisions are made. Rows are written one by one and skipped when
they are there already.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar
from benchmarks.cifar10_width import SLACK, Bench, load_bench, uniform_widths
from benchmarks.common import (
    count_macs,
    count_params,
    environment,
    read_json,
    write_json,
)
from benchmarks.methods import FLAGSHIP, OURS, Method, methods

OUT = Path(__file__).resolve().parent / "results" / "methods_cifar10.json"
NET = "resnet20-jpeg"
TEST = 2500
BUDGETS = (50, 30, 70)
SPLITS = ("test", "validation")
WIDTHS = ("budget", "foreseen", "uniform", FLAGSHIP)
KEY = ("net", "split", "method", "widths", "repair", "budget", "seed")


@dataclass(frozen=True)
class Case:
    """One cell: a method with a repair at a budget (percent of MACs kept).

    Args:
        method: what ranks the channels.
        repair: a key of the method's repairs.
        widths: `budget`, `foreseen`, `uniform`, or the method whose widths are taken.
        budget: percent of the MACs.
        seed: of the calibration draw.
    """

    method: Method
    repair: str
    widths: str
    budget: int
    seed: int


@dataclass
class Lab:
    """One network with its images, and what calibration saw of it: once for all methods.

    Args:
        bench: the network.
        splits: of `test` and `validation`: whose images judge a network.
        images: how many of each.
    """

    bench: Bench
    splits: tuple[str, ...] = ("test",)
    images: int = TEST
    seen: dict[int, tuple[frozenset[str], Any, Any, float]] = field(default_factory=dict)
    plans: dict[tuple[object, ...], Any] = field(default_factory=dict)
    dense: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def batches(self, seed: int) -> Sequence[Tensor]:
        """Draw what a method may see."""
        return cifar.batches(self.bench.calibration(seed).inputs())

    def judges(self, split: str, seed: int) -> cifar.Split:
        """Take the images that a network is judged on, evenly spread: they are sorted by class."""
        held = cifar.draw(self.bench.train, seed, self.bench.samples)[1]
        whole = self.bench.test if split == "test" else held
        return whole.pick(torch.arange(0, len(whole), max(1, len(whole) // self.images)))

    def policy(self, case: Case) -> Any:
        """Say a case in the library's own words."""
        import torch_otprune as otp
        from torch_otprune.policy import Amount

        how = {"criterion": case.method.criterion, "repair": case.method.repairs[case.repair]}
        common = {
            "calibration": otp.Calibration(samples=self.bench.samples), "seed": case.seed
        }  # fmt: skip
        if case.widths in ("budget", "foreseen"):
            foresee = case.widths == "foreseen"
            budget = otp.Budget(macs=f"{case.budget}%", foresee=foresee)
            return otp.Policy(rules=(otp.Channels(**how),), budget=budget, **common)
        given = self.given(case)
        rules = tuple(  # a bare 1 would be everything
            otp.Channels(targets=paths, keep=Amount(k), **how) for paths, k in given.items()
        )
        return otp.Policy(rules=rules, **common)

    def given(self, case: Case) -> dict[tuple[str, ...], int]:
        """Find the widths of a case that does not choose them itself."""
        model, example = self.bench.model, self.bench.example
        if case.widths == "uniform":
            limit = int((case.budget / 100 + SLACK) * self.bench.macs)
            return {(p,): k for p, k in uniform_widths(model, example, target=limit).items()}
        other = Case(methods()[case.widths], OURS, "budget", case.budget, case.seed)
        plan, graph = self.plan(other)[0], self.observed(other)[1]
        return {graph.group(cut.group).owners: len(cut.keep) for cut in plan.cuts}

    def observed(self, case: Case) -> tuple[Any, Any, float]:
        """Run calibration once for all methods of a seed, and again for one that asks for more.

        Args:
            case: whose statistics.

        Returns:
            observation, graph, seconds of CPU.
        """
        import torch_otprune as otp
        from torch_otprune.attach.needs import needs_of

        known = self.seen.get(case.seed)
        asked = {"kind": "cpot", "measure": "activations"} if known is None else {}
        rule = otp.Channels(criterion=asked or case.method.criterion, repair=OURS)
        policy = otp.Policy(
            rules=(rule,),
            budget=otp.Budget(macs="50%"),
            calibration=otp.Calibration(samples=self.bench.samples),
            seed=case.seed,
        )
        wanted = needs_of(policy)
        if known is None or not wanted <= known[0]:
            model = copy.deepcopy(self.bench.model)
            start = time.process_time()
            with otp.attach(model, policy) as attached:
                otp.observe(attached, self.batches(case.seed))
                seen, graph = attached.observation(), attached.graph
            fresh = (wanted, seen, graph, time.process_time() - start)
            if known is None:
                self.seen[case.seed] = fresh
                return self.observed(case)
            return fresh[1:]
        return known[1:]

    def plan(self, case: Case) -> tuple[Any, float]:
        """Decide, once for all repairs that are priced alike.

        Returns:
            the plan and the seconds of CPU it took.
        """
        from torch_otprune.decide import decide

        policy = self.policy(case)
        # only a refit changes the prices, and with them the widths
        refits = any(getattr(r, "refits", False) for rule in policy.rules for r in rule.repair)
        key = (case.method.name, case.widths, refits, case.budget, case.seed)
        if key not in self.plans:
            seen, graph, _ = self.observed(case)
            some = self.batches(case.seed)[0][:2]
            start = time.process_time()
            made = decide(copy.deepcopy(self.bench.model), policy, graph, seen, some)
            self.plans[key] = (made, time.process_time() - start)
        made, took = self.plans[key]
        return made.model_copy(update={"policy": policy}), took

    def prune(self, case: Case) -> tuple[nn.Module, float]:
        """Decide, cut and repair; what `otp.prune_` does, less its report.

        Returns:
            the smaller network and the seconds of CPU, without those of calibration.
        """
        from torch_otprune.pipeline import repair_
        from torch_otprune.surgery import cut_

        plan, decided = self.plan(case)
        graph, dense = self.observed(case)[1], self.bench.model
        small = copy.deepcopy(dense)
        start = time.process_time()
        cut_(small, plan.cuts)
        repair_(small, dense, graph, plan, self.batches(case.seed))
        return small, decided + time.process_time() - start

    def place(self, case: Case | None, split: str, seed: int) -> dict[str, Any]:
        """Name a cell in its row; the dense network's has no case."""
        where = {"net": self.bench.net, "split": split, "seed": seed}
        if case is None:
            return where | {"method": "dense", "widths": "", "repair": "none", "budget": 100}
        return where | {
            "method": case.method.name,
            "widths": case.widths,
            "repair": case.repair,
            "budget": case.budget,
        }

    def measure(self, case: Case | None, seed: int) -> dict[str, dict[str, Any]]:
        """Prune once and judge on every split.

        Args:
            case: what; None for the dense network.
            seed: of the calibration draw.

        Returns:
            split to plain JSON values; errors in percent, times in seconds of CPU: on a busy
            machine the clock on the wall tells who else was there.
        """
        bench = self.bench
        small, seconds = (bench.model, 0.0) if case is None else self.prune(case)
        common = {
            "macs_kept": round(count_macs(small, bench.example) / bench.macs, 4),
            "params_kept": round(count_params(small) / count_params(bench.model), 4),
            "cpu_seconds": round(seconds, 3),
            "calibration_cpu_seconds": 0.0 if case is None else round(self.observed(case)[2], 3),
        }
        return {split: self.judge(small, split, seed) | common for split in self.splits}

    def judge(self, model: nn.Module, split: str, seed: int) -> dict[str, Any]:
        """Read error, loss, and how far the logits moved, on the images of a split."""
        images = self.judges(split, seed)
        if (split, seed) not in self.dense:
            self.dense[split, seed] = logits(self.bench.model, images)
        dense, said = self.dense[split, seed], logits(model, images)
        right = (said.argmax(1) == images.labels).double().mean()
        return {
            "error": round(100 - 100 * float(right), 3),
            "loss": round(float(F.cross_entropy(said, images.labels)), 5),
            "moved": round(float((said - dense).norm() / dense.norm()), 5),
            "images": len(images),
        }

    def attempt(self, case: Case | None, seed: int) -> dict[str, dict[str, Any]]:
        """Measure, or say in the rows why not: one bad setting must not stop a long run."""
        try:
            return self.measure(case, seed)
        except Exception as error:
            failed = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            return dict.fromkeys(self.splits, failed)


@torch.inference_mode()
def logits(model: nn.Module, images: cifar.Split) -> Tensor:
    """Run a classifier on all images.

    Returns:
        images x classes, in float64.
    """
    model.eval()
    return torch.cat([model(part).double() for part in cifar.batches(images.inputs(), 256)])


def cases(
    *, seeds: Sequence[int], budgets: Sequence[int], widths: Sequence[str], only: str = ""
) -> Iterator[Case]:
    """List the cells in the order in which they matter: whole tables of one seed first.

    Args:
        seeds: of the calibration draw.
        budgets: percent of the MACs.
        widths: of `WIDTHS`, or names of methods.
        only: regular expression on `method/widths/repair`.

    Yields:
        cells; where neither choice nor repair reads data, those of the first seed alone.
    """
    for seed in seeds:
        for width in widths:
            for budget in budgets:
                for method in methods().values():
                    if method.recipe and width != "uniform":
                        continue
                    for repair in method.repairs:
                        if width == "foreseen" and repair != OURS:
                            continue  # there is no refit to foresee
                        reads = method.data or width != "uniform" or _reads(method, repair)
                        name = f"{method.name}/{width}/{repair}"
                        if re.search(only, name) and (reads or seed == seeds[0]):
                            yield Case(method, repair, width, budget, seed)


def _reads(method: Method, repair: str) -> bool:
    """Tell whether a repair learns from images."""
    free = ("scale", "none")
    return any(not isinstance(r, dict) or free not in r.items() for r in method.repairs[repair])


def run(
    lab: Lab, todo: Iterable[Case], out: Path, *, minutes: float = 0.0, force: bool = False
) -> None:
    """Measure what is not there yet, and write after each row.

    Args:
        lab: where.
        todo: what.
        out: the JSON file; its other rows are kept.
        minutes: when to stop; 0 for never.
        force: measure again what is there. What failed is always tried again.
    """
    question = (__doc__ or "").split("\n\n    ")[0]
    payload = {"environments": {}, "rows": []} | read_json(out) | {"question": question}
    rows = {_key(row): row for row in payload["rows"]}
    start = time.monotonic()
    seeds: dict[int, None] = {}
    for case in todo:
        if minutes and time.monotonic() - start > 60 * minutes:
            return
        # before the first case of a seed: on validation images, each seed has its own
        for one in ([None] if case.seed not in seeds else []) + [case]:
            places = {split: lab.place(one, split, case.seed) for split in lab.splits}
            if not force and all("error" in rows.get(_key(p), {}) for p in places.values()):
                continue
            env = environment()
            mark = hashlib.sha256(json.dumps(env).encode()).hexdigest()[:8]
            payload["environments"][mark] = env
            for split, found in lab.attempt(one, case.seed).items():
                row = places[split] | found | {"environment": mark}
                rows[_key(row)] = row
                print(*_key(row), row.get("error", row.get("failed")), flush=True)
            write_json(out, payload | {"rows": list(rows.values())})
        seeds[case.seed] = None


def _key(row: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(row[name] for name in KEY)


def quick_bench() -> Bench:
    """Make a tiny network with random images: does it run?"""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = cifar.Split(pixels, torch.randint(0, 10, (256,), generator=generator))
    torch.manual_seed(0)
    model = cifar.ResNet(blocks=1, width=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # or criteria tie, and any choice is right
    some = images.pick(torch.arange(192))
    return Bench("tiny", model.eval(), some, images.pick(torch.arange(192, 256)), samples=128)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--net", choices=list(cifar.NETS), default=NET)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS))
    parser.add_argument("--only", default="", help="regular expression on method/widths/repair")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--images", type=int, default=TEST, help="that judge a network")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--quick", action="store_true", help="a tiny network, random images")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    if args.data is None and not args.quick:
        parser.error("--data is required, but with --quick.")
    if args.net != NET and args.out == OUT:
        parser.error("--out is required with another --net: one file holds one network.")
    bench = quick_bench() if args.quick else load_bench(args.net, args.data, args.data)
    lab = Lab(bench, tuple(args.splits), args.images)
    todo = cases(seeds=args.seeds, budgets=args.budgets, widths=args.widths, only=args.only)
    run(lab, todo, args.out, minutes=args.minutes, force=args.force)


if __name__ == "__main__":
    main()
