"""How much accuracy does a CIFAR-10 ResNet lose when it is cut to 30, 50 or 70 % of its MACs?

One shot, from 1 024 training images, against Torch-Pruning at its best. Expected before
measuring: at 50 % of the MACs, without labels, our default loses at most a third of what the
best peer loses and at most a fifth with `reconstruct`; no setting of ours is worse than the
peer it extends; a whole-model budget beats uniform widths.

    python benchmarks/cifar10_width.py --data DATA --which peers,ours
    python benchmarks/cifar10_width.py --data DATA --which finetune --nets resnet20-jpeg
    python benchmarks/plot_cifar10_width.py

Rows are written one by one and skipped when they are there already. To change what is
measured, edit `PEERS` and `OURS`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar, peers
from benchmarks.common import (
    Measured,
    count_macs,
    count_params,
    environment,
    macs_by_module,
    measured,
    read_json,
    write_json,
)

OUT = Path(__file__).resolve().parent / "results" / "cifar10_width.json"
# Equal widths hit a budget only roughly; peers and our uniform rows may exceed it by this
# share of the dense MACs. Our whole-model budgets may not.
SLACK = 0.01


@dataclass(frozen=True)
class Spec:
    """One method.

    Args:
        side: `peer`, `ours` or `dense`.
        criterion: what ranks the channels.
        groups: `inner` for the blocks' inner channels, `all` for everything that can be
            cut; peers also `all_fixed`, see `peers.Peer`.
        widths: who decides how many channels each group keeps: `local` or `global` for
            peers; `uniform` or `budget` for ours.
        repair: names joined by `+`.
        epochs: of fine-tuning with labels afterwards.
    """

    side: str
    criterion: str = "none"
    groups: str = "none"
    widths: str = "none"
    repair: str = "none"
    epochs: float = 0.0

    @property
    def method(self) -> str:
        """Name it in one word."""
        return "/".join((self.criterion, self.groups, self.widths, self.repair))

    @property
    def labels(self) -> bool:
        """Say whether it sees labels."""
        return self.epochs > 0 or (self.side == "peer" and self.criterion == "taylor")

    @property
    def seeded(self) -> bool:
        """Say whether the calibration images can change its result."""
        weights_only = self.side == "peer" and not self.criterion.startswith("taylor")
        return not (self.side == "dense" or (weights_only and self.repair == "none"))


def _grid(
    side: str,
    criteria: Sequence[str],
    groups: Sequence[str],
    widths: Sequence[str],
    repairs: Sequence[str],
) -> list[Spec]:
    points = itertools.product(criteria, groups, widths, repairs)
    return [Spec(side, c, g, w, r) for c, g, w, r in points]


DENSE = Spec("dense")
PEERS: list[Spec] = [
    *_grid(
        "peer",
        ("magnitude", "taylor", "bn_scale", "fpgm"),
        ("inner", "all_fixed", "all"),
        ("local", "global"),
        ("none", "norm"),
    ),
    *_grid("peer", ("taylor_pseudo",), ("inner",), ("local", "global"), ("none", "norm")),
]
OUR_DEFAULT = Spec("ours", "transport", "all", "budget", "least_squares")
_CRITERIA = (
    "transport", "obs", "magnitude", "bn_scale", "taylor", "activation", "fpgm", "cpot", "random",
)  # fmt: skip
OURS: list[Spec] = [
    OUR_DEFAULT,
    Spec("ours", "transport", "all", "budget", "reconstruct"),
    *_grid("ours", ("transport", "obs"), ("inner",), ("uniform",), ("least_squares",)),
    *_grid("ours", _CRITERIA[1:], ("all",), ("budget",), ("least_squares",)),
    *_grid("ours", _CRITERIA, ("all",), ("budget",), ("norm",)),
    *_grid("ours", ("transport",), ("all",), ("budget",), ("none", "bias", "least_squares+norm")),
]


@dataclass(frozen=True, eq=False)
class Bench:
    """One network with its images.

    Args:
        net: its name in the results.
        model: dense.
        train: where calibration images are drawn from, and what fine-tuning sees.
        test: for the final accuracy only.
        samples: how many images calibration may see.
        tuning: how many images fine-tuning may see; 0 for all.
    """

    net: str
    model: nn.Module
    train: cifar.Split
    test: cifar.Split
    samples: int = cifar.CALIBRATION
    tuning: int = 0

    def calibration(self, seed: int) -> cifar.Split:
        """Draw the images a method may see."""
        return cifar.draw(self.train, seed, self.samples)[0]

    @property
    def example(self) -> Tensor:
        """Give one input."""
        return self.test.pick(torch.tensor([0])).inputs()

    @cached_property
    def macs(self) -> int:
        """Count the dense MACs."""
        return count_macs(self.model, self.example)


def load_bench(net: str, data: Path, weights: Path, *, tuning: int = 0) -> Bench:
    """Load a network of `cifar.NETS` with the images it was trained for."""
    images = cifar.NETS[net].images
    train, test = (cifar.load_split(data, images, part) for part in ("train", "test"))
    return Bench(net, cifar.load_net(net, weights), train, test, tuning=tuning)


@dataclass(frozen=True)
class Case:
    """One cell of the table: a method at a budget (percent of MACs kept) with a seed."""

    bench: Bench
    spec: Spec
    budget: int
    seed: int

    @property
    def key(self) -> tuple[object, ...]:
        """Tell two rows apart."""
        spec = self.spec
        return (self.bench.net, spec.side, spec.method, spec.epochs, self.budget, self.seed)


@lru_cache(maxsize=16)  # all budgets and seeds of one peer
def _peer_cut(case: Case) -> tuple[nn.Module, Measured]:
    """Cut once for all repairs and, where data play no role, for all seeds."""
    spec, bench = case.spec, case.bench
    peer = peers.Peer(spec.criterion, spec.groups, spec.widths)
    data = bench.calibration(case.seed)
    limit = int((case.budget / 100 + SLACK) * bench.macs)
    ratio = peers.find_ratio(bench.model, peer, data, target=limit)
    with measured() as took:
        smaller = peers.prune(bench.model, peer, data, ratio=ratio)
    return smaller, took


def run_peer(case: Case) -> tuple[nn.Module, Measured]:
    """Prune with Torch-Pruning; the search for its ratio is not timed."""
    bare = replace(case.spec, repair="none", epochs=0.0)
    cut = replace(case, spec=bare, seed=case.seed if bare.seeded else 0)
    dense, cut_took = _peer_cut(cut)
    smaller, inputs = copy.deepcopy(dense), case.bench.calibration(case.seed).inputs()
    with measured() as took:
        if case.spec.repair == "norm":
            peers.renorm_(smaller, inputs)
    return smaller, Measured(
        cut_took.seconds + took.seconds,
        max(cut_took.peak_mib, took.peak_mib),
        max(cut_took.extra_mib, took.extra_mib),
    )


def uniform_widths(model: nn.Module, example: Tensor, *, target: int) -> dict[str, int]:
    """Keep the same share of every block's inner channels, the most that fits.

    Args:
        model: dense.
        example: one input.
        target: MACs to stay under.

    Returns:
        kept channels by path of the block's first convolution.
    """
    macs, inner = macs_by_module(model, example), peers.inner_paths(model)
    units = {path: len(model.get_parameter(f"{path}.weight")) for path in inner}
    each = {p: macs[p] + macs[p.removesuffix("conv1") + "conv2"] for p in inner}
    fixed = sum(macs.values()) - sum(each.values())
    best = dict.fromkeys(inner, 1)
    for step in range(1, 1025):
        widths = {p: max(1, int(units[p] * step / 1024)) for p in inner}
        if fixed + sum(each[p] * widths[p] // units[p] for p in inner) <= target:
            best = widths
    return best


def our_policy(case: Case) -> Any:
    """Say a case in the library's own words."""
    import torch_otprune as otp
    from torch_otprune.policy import Amount

    spec, bench = case.spec, case.bench
    how: dict[str, Any] = {"criterion": spec.criterion, "repair": tuple(spec.repair.split("+"))}
    budget = None
    if spec.widths == "uniform":
        limit = int((case.budget / 100 + SLACK) * bench.macs)
        widths = uniform_widths(bench.model, bench.example, target=limit)
        rules = [otp.Channels(targets=(p,), keep=Amount(k), **how) for p, k in widths.items()]
    else:
        inner = tuple(peers.inner_paths(bench.model))
        rules = [otp.Channels(targets=inner if spec.groups == "inner" else ("auto",), **how)]
        budget = otp.Budget(macs=f"{case.budget}%")
    samples = otp.Calibration(samples=bench.samples)
    return otp.Policy(rules=tuple(rules), budget=budget, calibration=samples, seed=case.seed)


def run_ours(case: Case) -> tuple[nn.Module, Measured]:
    """Prune with this library, from unlabelled images."""
    import torch_otprune as otp

    model, policy = copy.deepcopy(case.bench.model), our_policy(case)
    data = cifar.batches(case.bench.calibration(case.seed).inputs())
    with measured() as took:
        otp.prune_(model, policy, data)
    return model, took


def run_dense(case: Case) -> tuple[nn.Module, Measured]:
    """Do nothing, for the level to compare with."""
    return copy.deepcopy(case.bench.model), Measured()


RUNNERS = {"dense": run_dense, "peer": run_peer, "ours": run_ours}


def measure(case: Case) -> dict[str, Any]:
    """Prune, fine-tune if asked to, and read the test accuracy.

    Args:
        case: what to measure.

    Returns:
        one row of plain JSON values. `seconds` excludes fine-tuning and evaluation.
    """
    spec, bench = case.spec, case.bench
    model, took = RUNNERS[spec.side](case)
    if spec.epochs:
        train = cifar.draw(bench.train, case.seed, bench.tuning or len(bench.train))[0]
        cifar.finetune_(model, train, epochs=spec.epochs, seed=case.seed)
    row = {"net": bench.net, "budget": case.budget, **asdict(spec), "seed": case.seed}
    return row | {
        "method": spec.method,
        "labels": spec.labels,
        "accuracy": round(cifar.accuracy(model, bench.test), 3),
        "test_images": len(bench.test),
        "tuning_images": (bench.tuning or len(bench.train)) if spec.epochs else 0,
        "macs_kept": round(count_macs(model, bench.example) / bench.macs, 4),
        "params_kept": round(count_params(model) / count_params(bench.model), 4),
        "seconds": round(took.seconds, 3),
        "peak_mib": round(took.peak_mib, 1),
        "extra_mib": round(took.extra_mib, 1),
    }


def row_key(row: dict[str, Any]) -> tuple[object, ...]:
    """Read a row's key: equal to its case's."""
    return tuple(row[name] for name in ("net", "side", "method", "epochs", "budget", "seed"))


def _attempt(case: Case) -> dict[str, Any]:
    """Measure, or say in the row why not: one bad setting must not stop a long run."""
    try:
        return measure(case)
    except Exception as error:
        spec = asdict(case.spec) | {"method": case.spec.method}
        where = {"net": case.bench.net, "budget": case.budget, "seed": case.seed}
        return where | spec | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def run(cases: Iterable[Case], out: Path, *, force: bool = False) -> None:
    """Measure what is not there yet, and write after each row.

    Args:
        cases: what to measure, in order.
        out: the JSON file; its other rows are kept.
        force: measure again what is there. What failed is always tried again.
    """
    payload = {"environments": {}, "rows": []} | read_json(out)
    payload |= {"question": (__doc__ or "").split("\n\n    ")[0], "slack": SLACK}
    rows = {row_key(row): row for row in payload["rows"]}
    for case in cases:
        if "accuracy" in rows.get(case.key, {}) and not force:
            continue
        row, env = _attempt(case), environment()
        row["environment"] = hashlib.sha256(json.dumps(env).encode()).hexdigest()[:8]
        payload["environments"][row["environment"]] = env
        rows[case.key] = row
        write_json(out, payload | {"rows": list(rows.values())})
        print(*case.key, row.get("accuracy", row.get("error")), row.get("seconds"), flush=True)


def cases_of(
    bench: Bench, pairs: Iterable[tuple[Spec, int]], *, seeds: Sequence[int]
) -> Iterator[Case]:
    """List the cells of one network; a method that reads no data has one seed."""
    yield Case(bench, DENSE, 100, 0)
    for spec, budget in pairs:
        for seed in seeds if spec.seeded or spec.epochs else seeds[:1]:
            yield Case(bench, spec, budget, seed)


def tuned(net: str, out: Path, budgets: Sequence[int]) -> list[tuple[Spec, int]]:
    """Choose what deserves fine-tuning: the dense network, the best peer, our default."""
    from benchmarks.plot_cifar10_width import best_peers

    best = {b: found for (n, _, b), found in best_peers(read_json(out)).items() if n == net}
    pairs = [(DENSE, 100)]
    for budget in budgets:
        if budget not in best:
            raise SystemExit(f"no peers of {net} at {budget} % yet: run with --which peers first.")
        pairs += [(spec, budget) for spec in PEERS if spec.method == best[budget].method]
        pairs += [(OUR_DEFAULT, budget)]
    return [(replace(spec, epochs=1.0), budget) for spec, budget in pairs]


def chosen(which: str, net: str, out: Path, budgets: Sequence[int]) -> list[tuple[Spec, int]]:
    """List the methods and budgets that `--which` names."""
    pairs: list[tuple[Spec, int]] = []
    for name in which.split(","):
        if name == "finetune":
            pairs += tuned(net, out, budgets)
        else:
            pairs += itertools.product({"peers": PEERS, "ours": OURS}[name], budgets)
    return list(dict.fromkeys(pairs))


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--weights", type=Path, help="folder of the weights; default: --data")
    parser.add_argument("--nets", nargs="+", choices=list(cifar.NETS), default=list(cifar.NETS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[30, 50, 70])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--which", default="peers,ours", help="of peers, ours, finetune")
    parser.add_argument("--only", default="", help="regular expression on criterion/groups/...")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tuning", type=int, default=0, help="fine-tune on this many images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    for net in args.nets:
        bench = load_bench(net, args.data, args.weights or args.data, tuning=args.tuning)
        pairs = chosen(args.which, net, args.out, args.budgets)
        pairs = [(spec, budget) for spec, budget in pairs if re.search(args.only, spec.method)]
        run(cases_of(bench, pairs, seeds=range(args.seeds)), args.out, force=args.force)


if __name__ == "__main__":
    main()
