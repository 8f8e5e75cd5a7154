"""Do masks that training finds beat a cut at the start, for the same number of training steps?

Every method trains for equally many steps with the same optimiser, rates and images. `dtp` masks
while it trains and cuts at the end; `one_shot` cuts first and fine-tunes; `rounds` cuts in rounds
while it trains. Expected before measuring: at 50 % of the MACs `dtp` is within a point of the
best other method, and at 30 % above all of them, as there the choice matters more than the repair;
on the short schedule the repair of `one_shot` may still be ahead.

    python benchmarks/dtp_cifar10.py --data DATA
    python benchmarks/dtp_cifar10.py --data DATA --schedule medium --only "dtp|one_shot/t"
    python benchmarks/dtp_cifar10.py --data DATA --schedule full --device cuda
    python benchmarks/dtp_cifar10.py --quick --out /tmp/dtp.json
    python benchmarks/plot_dtp_cifar10.py

Rows are written one by one and skipped when they are there already. `--solver` times the search
for the threshold instead.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar
from benchmarks.common import count_macs, count_params, environment, read_json, write_json

OUT = Path(__file__).resolve().parent / "results" / "dtp_cifar10.json"
METHODS = ("dense", "dtp", "one_shot/transport", "one_shot/magnitude", "rounds/transport")
SEARCH = 0.6  # share of the steps in which masks are soft
ROUNDS = 4
NET = "resnet20-jpeg"
TEST = 2500


@dataclass(frozen=True)
class Schedule:
    """How long everybody trains.

    Args:
        name: in the results.
        steps: of the optimiser.
        batch: images per step.
        rate: the learning rate at its highest.
        budgets: percent of MACs kept.
        seeds: how many.
    """

    name: str
    steps: int
    batch: int
    rate: float
    budgets: tuple[int, ...]
    seeds: int


SCHEDULES = {
    "short": Schedule("short", 300, 64, 0.01, (50, 30), 2),
    "medium": Schedule("medium", 2000, 64, 0.03, (50, 30), 1),
    "full": Schedule("full", 3000, 128, 0.03, (70, 50, 30), 3),
    "quick": Schedule("quick", 10, 16, 0.01, (50,), 1),
}


@dataclass(frozen=True, eq=False)
class Bench:
    """A trained network, its images, and where it trains."""

    net: str
    model: nn.Module
    train: cifar.Split
    test: cifar.Split
    device: str = "cpu"

    @property
    def example(self) -> Tensor:
        """Give two inputs."""
        return self.train.pick(torch.tensor([0, 1])).inputs().to(self.device)

    @cached_property
    def macs(self) -> int:
        """Count the dense MACs."""
        return count_macs(self.model, self.example[:1])

    def fresh(self) -> nn.Module:
        """Copy the dense network."""
        return copy.deepcopy(self.model).to(self.device)

    def calibration(self, seed: int) -> list[Tensor]:
        """Draw what a cut may look at."""
        seen = cifar.draw(self.train, seed, min(cifar.CALIBRATION, len(self.train)))[0]
        return [part.to(self.device) for part in cifar.batches(seen.inputs())]


def load_bench(data: Path, device: str) -> Bench:
    """Load ResNet-20 with its training images and every fourth test image."""
    train, test = (cifar.load_split(data, cifar.NETS[NET].images, p) for p in ("train", "test"))
    judges = test.pick(torch.arange(0, len(test), len(test) // TEST))
    return Bench(NET, cifar.load_net(NET, data), train, judges, device)


def quick_bench(device: str = "cpu") -> Bench:
    """Make a small network and noise, to try the script itself."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> cifar.Split:
        pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return cifar.Split(pixels, torch.randint(0, 10, (count,), generator=generator))

    return Bench("tiny", cifar.ResNet(blocks=1, width=8), some(64), some(32), device)


Step = Callable[[torch.optim.Optimizer], object]
_Took = tuple[float, float]


def train_(
    model: nn.Module, bench: Bench, schedule: Schedule, seed: int, *, step: Step
) -> tuple[float, float]:
    """Train with labels: SGD with momentum, one cycle, crop and flip.

    Args:
        model: trained in place, left in evaluation mode.
        bench: the images.
        schedule: how long.
        seed: of shuffling and augmentation.
        step: told the optimiser after each of its steps.

    Returns:
        seconds in all, and those of `step`.
    """
    generator, size = torch.Generator().manual_seed(seed), schedule.batch
    sgd = torch.optim.SGD(model.parameters(), lr=schedule.rate, momentum=0.9, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        sgd, max_lr=schedule.rate, total_steps=schedule.steps + 1
    )
    model.train()
    order, inside, start = torch.empty(0, dtype=torch.int64), 0.0, time.perf_counter()
    for _ in range(schedule.steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(bench.train), generator=generator)])
        index, order = order[:size], order[size:]
        part = cifar._augment(bench.train.pick(index), generator)
        given, labels = part.inputs().to(bench.device), part.labels.to(bench.device)
        loss = F.cross_entropy(model(given), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        cycle.step()
        before = time.perf_counter()
        step(sgd)
        inside += time.perf_counter() - before
    model.eval()
    return time.perf_counter() - start, inside


def run_dtp(bench: Bench, schedule: Schedule, budget: int, seed: int) -> tuple[nn.Module, _Took]:
    """Mask while training, then cut."""
    import torch_otprune as otp

    model, steps = bench.fresh(), max(1, int(SEARCH * schedule.steps))
    rule = otp.Channels(criterion={"kind": "dtp", "steps": steps}, repair="none")
    policy = otp.Policy(rules=rule, budget=otp.Budget(macs=f"{budget}%"), seed=seed)
    with otp.attach(model, policy, example=bench.example) as attached:
        took = train_(model, bench, schedule, seed, step=lambda _: attached.step())
        plan = attached.plan()
    otp.apply_(model, plan, bench.calibration(seed), timing=0)
    return model, took


def run_one_shot(
    criterion: str, bench: Bench, schedule: Schedule, budget: int, seed: int
) -> tuple[nn.Module, _Took, float]:
    """Cut with the default repair, then fine-tune; tell the accuracy between the two as well."""
    import torch_otprune as otp

    model, rule = bench.fresh(), otp.Channels(criterion=criterion)
    policy = otp.Policy(rules=rule, budget=otp.Budget(macs=f"{budget}%"), seed=seed)
    otp.prune_(model, policy, bench.calibration(seed), timing=0)
    untrained = cifar.accuracy(copy.deepcopy(model).cpu(), bench.test)
    return model, train_(model, bench, schedule, seed, step=lambda _: None), untrained


def run_rounds(
    criterion: str, bench: Bench, schedule: Schedule, budget: int, seed: int
) -> tuple[nn.Module, _Took]:
    """Cut in rounds while training, the last one where the masks of `dtp` become hard."""
    import torch_otprune as otp

    model, last = bench.fresh(), max(1, int(SEARCH * schedule.steps))
    at = sorted({max(1, last * (i + 1) // ROUNDS) for i in range(ROUNDS)})
    policy = otp.Policy(
        rules=otp.Channels(criterion=criterion),
        budget=otp.Budget(macs=f"{budget}%"),
        schedule=otp.Schedule(at=at),
        seed=seed,
    )
    data = bench.calibration(seed)
    with otp.attach(model, policy, data=data) as attached:
        took = train_(model, bench, schedule, seed, step=attached.step)
    return model, took


def measure(
    method: str, bench: Bench, schedule: Schedule, budget: int, seed: int
) -> dict[str, Any]:
    """Train by one method and read the test accuracy.

    Args:
        method: one of `METHODS`.
        bench: the network.
        schedule: how long.
        budget: percent of MACs kept.
        seed: of everything drawn.

    Returns:
        plain JSON values.
    """
    kind, _, criterion = method.partition("/")
    untrained: float | None = None
    if method == "dense":
        model, took = bench.fresh().eval(), (0.0, 0.0)
    elif kind == "dtp":
        model, took = run_dtp(bench, schedule, budget, seed)
    elif kind == "one_shot":
        model, took, untrained = run_one_shot(criterion, bench, schedule, budget, seed)
    else:
        model, took = run_rounds(criterion, bench, schedule, budget, seed)
    model = model.cpu()
    example = bench.example[:1].cpu()
    return {
        "accuracy": round(cifar.accuracy(model, bench.test), 3),
        "accuracy_untrained": untrained if untrained is None else round(untrained, 3),
        "test_images": len(bench.test),
        "train_images": len(bench.train),
        "macs_kept": round(count_macs(model, example) / bench.macs, 4),
        "params_kept": round(count_params(model) / count_params(bench.model), 4),
        "seconds": round(took[0], 2),
        "seconds_pruning": round(took[1], 2),
    }


def places(bench: Bench, schedule: Schedule, only: str) -> Iterator[dict[str, Any]]:
    """List the cells of the table."""
    for seed in range(schedule.seeds):
        for budget in schedule.budgets:
            for method in (m for m in METHODS if re.search(only, m)):
                if method == "dense" and (seed, budget) != (0, schedule.budgets[0]):
                    continue
                yield {
                    "net": bench.net,
                    "schedule": schedule.name,
                    "steps": schedule.steps,
                    "batch": schedule.batch,
                    "rate": schedule.rate,
                    "method": method,
                    "budget": 100 if method == "dense" else budget,
                    "seed": seed,
                    "device": bench.device,
                }


def attempt(place: dict[str, Any], bench: Bench, schedule: Schedule) -> dict[str, Any]:
    """Measure, or say in the row why not: one bad setting must not stop a long run."""
    try:
        return place | measure(place["method"], bench, schedule, place["budget"], place["seed"])
    except Exception as error:
        return place | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def run(bench: Bench, schedule: Schedule, out: Path, *, only: str, force: bool) -> None:
    """Measure what is not there yet, and write after each row."""
    payload = {"environments": {}, "rows": [], "solver": []} | read_json(out)
    payload |= {"question": (__doc__ or "").split("\n\n    ")[0], "search": SEARCH}
    key = ("net", "schedule", "steps", "batch", "rate", "method", "budget", "seed", "device")
    rows = {tuple(row.get(name) for name in key): row for row in payload["rows"]}
    for place in places(bench, schedule, only):
        where = tuple(place[name] for name in key)
        if "accuracy" in rows.get(where, {}) and not force:
            continue
        row, env = attempt(place, bench, schedule), environment()
        row["environment"] = hashlib.sha256(json.dumps(env).encode()).hexdigest()[:8]
        payload["environments"][row["environment"]] = env
        rows[where] = row
        write_json(out, payload | {"rows": list(rows.values())})
        print(*where, row.get("accuracy", row.get("error")), row.get("seconds"), flush=True)


def solve(entries: int, device: str, *, costs: bool = False) -> dict[str, Any]:
    """Time one threshold and its mask, and count the reads of every entry.

    Args:
        entries: of the mask, in float32.
        device: `cpu` or `cuda`.
        costs: whether every entry has a cost of its own.

    Returns:
        seconds, passes, and the seconds that reading the entries once takes.
    """
    from torch_otprune.transport.threshold import fill_, threshold

    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(entries, generator=generator, device=device)
    paid = torch.rand(entries, generator=generator, device=device) + 0.1 if costs else None
    total = float(entries if paid is None else paid.sum(dtype=torch.float64))
    mask = torch.empty_like(scores)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found, times, floors = None, [], []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        found = threshold([scores], 0.3 * total, eps=0.05, costs=None if paid is None else [paid])
        fill_(mask, scores, found.at, 0.05)
        wait()
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        mask.copy_(scores)
        wait()
        floors.append(time.perf_counter() - start)
    assert found is not None
    return {
        "entries": entries,
        "device": device,
        "costs": costs,
        "bytes": entries * scores.element_size(),
        "passes": found.passes + 1,
        "missed": abs(found.missed) / (0.3 * total),
        "seconds": round(min(times), 4),
        "seconds_copy": round(min(floors), 4),
    }


def run_solver(out: Path, device: str, entries: Sequence[int]) -> None:
    """Time thresholds of several sizes, and write them beside the rows."""
    payload = {"environments": {}, "rows": [], "solver": []} | read_json(out)
    env = environment()
    name = hashlib.sha256(json.dumps(env).encode()).hexdigest()[:8]
    payload["environments"][name] = env
    for count in entries:
        for costs in (False, True):
            found = solve(count, device, costs=costs) | {"environment": name}
            same = ("entries", "device", "costs")
            kept = [r for r in payload["solver"] if any(r[key] != found[key] for key in same)]
            payload["solver"] = [*kept, found]
            write_json(out, payload)
            print(found, flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--quick", action="store_true", help="noise and a tiny network")
    parser.add_argument("--schedule", choices=["short", "medium", "full"], default="short")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", default="", help="regular expression on methods")
    parser.add_argument("--seeds", type=int, help="instead of the schedule's")
    parser.add_argument("--budgets", nargs="+", type=int, help="instead of the schedule's")
    parser.add_argument(
        "--solver", nargs="*", type=int, help="time the threshold of so many entries"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    if args.solver is not None:
        run_solver(args.out, args.device, args.solver or (10**6, 10**7, 10**8))
        return
    if not args.quick and args.data is None:
        parser.error("--data is needed, or --quick")
    schedule = SCHEDULES["quick" if args.quick else args.schedule]
    schedule = replace(schedule, seeds=args.seeds or schedule.seeds)
    schedule = replace(schedule, budgets=tuple(args.budgets or schedule.budgets))
    bench = quick_bench(args.device) if args.quick else load_bench(args.data, args.device)
    run(bench, schedule, args.out, only=args.only, force=args.force)


if __name__ == "__main__":
    main()
