"""How much accuracy does a CIFAR-10 ResNet lose when one to nine of its blocks are taken out?

Training-free, from 1 024 unlabelled training images. Expected before measuring: at every depth we
lose no more than any baseline, and with a third of all blocks gone at most 0.3 of what the best
one loses, whichever cheap repair it gets.

    python benchmarks/cifar10_depth.py --data DATA
    python benchmarks/cifar10_depth.py --quick --out /tmp/depth.json
    python benchmarks/plot_cifar10_depth.py

Rows are written one by one and skipped when they are there already. To change what is measured,
edit `BASELINES` and `OURS`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar, depth_baselines
from benchmarks.common import Measured, count_macs, count_params, measured
from benchmarks.depth_harness import Cell, Spec, paired_latency, run

OUT = Path(__file__).resolve().parent / "results" / "cifar10_depth.json"
NETS = ("resnet20", "resnet32")
RANDOM_DRAWS = 5  # at least: random choices differ more than calibration images do
PROBE = 256  # images on which sets of blocks are compared: with fewer, seeds choose differently
ROUNDS, BATCH = 11, 64

DENSE = Spec("dense")
BASELINES = [
    Spec("baseline", choice, repair)
    for choice, repair in itertools.product(depth_baselines.SCORES, depth_baselines.REPAIRS)
]
# Choice and replacement by name, then the repairs of what stays, joined by `+`.
OURS = [
    Spec("ours", "transport", "affine+least_squares"),
    Spec("ours", "transport", "identity+none"),
    Spec("ours", "transport", "identity+norm"),
    Spec("ours", "transport", "identity+least_squares"),
]


@dataclass
class Bench:
    """One network with its images.

    Args:
        net: its name in the results.
        model: dense.
        train: where calibration images are drawn from.
        test: for the final accuracy only.
        samples: how many images a method may see.
        rounds: of the clock.
    """

    net: str
    model: nn.Module
    train: cifar.Split
    test: cifar.Split
    samples: int = cifar.CALIBRATION
    rounds: int = ROUNDS
    clocks: dict[tuple[str, ...], dict[str, float]] = field(default_factory=dict)
    right: Tensor | None = None

    def calibration(self, seed: int) -> Tensor:
        """Draw the images a method may see."""
        return cifar.draw(self.train, seed, self.samples)[0].inputs()

    @property
    def example(self) -> Tensor:
        """Give one input."""
        return self.test.pick(torch.tensor([0])).inputs()

    def clock(self, small: nn.Module, gone: tuple[str, ...]) -> dict[str, float]:
        """Time a network beside the dense one; weights do not matter, so once per shape."""
        if gone not in self.clocks:
            batch = self.test.pick(torch.arange(min(BATCH, len(self.test)))).inputs()
            self.clocks[gone] = paired_latency(
                self.model, small, lambda model: model(batch), rounds=self.rounds
            )
        return self.clocks[gone]


def load_bench(net: str, data: Path) -> Bench:
    """Load a network of `cifar.NETS` with the images it was trained for."""
    images = cifar.NETS[net].images
    train, test = (cifar.load_split(data, images, part) for part in ("train", "test"))
    return Bench(net, cifar.load_net(net, data), train, test)


def quick_bench() -> Bench:
    """Build a tiny untrained network and random images, to try the harness without data."""
    torch.manual_seed(0)
    model = cifar.ResNet(blocks=2, width=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # or criteria tie
    pixels = torch.randint(0, 256, (224, 3, 16, 16), dtype=torch.uint8)
    images = cifar.Split(pixels, torch.randint(0, 10, (224,)))
    train, test = images.pick(torch.arange(160)), images.pick(torch.arange(160, 224))
    return Bench("tiny", model.eval(), train, test, samples=128, rounds=2)


@torch.inference_mode()
def correct(model: nn.Module, test: cifar.Split) -> Tensor:
    """Say for every test image whether its class is found."""
    answers = [model.eval()(x).argmax(dim=1) for x in test.inputs().split(256)]
    return torch.cat(answers) == test.labels


def hexed(flags: Tensor) -> str:
    """Write flags as a hexadecimal number, the first one as its highest bit."""
    return f"{int(''.join('01'[int(flag)] for flag in flags), 2):0{-(-len(flags) // 4)}x}"


def ours(model: nn.Module, spec: Spec, inputs: Tensor, *, removed: int, seed: int) -> nn.Module:
    """Take blocks out with this library."""
    import torch_otprune as otp

    small = copy.deepcopy(model)
    replace, *repairs = spec.repair.split("+")
    rule = otp.Layers(
        targets=tuple(depth_baselines.removable(model)),
        drop=removed,
        criterion=spec.choice,
        replace=replace,
        repair=tuple(name for name in repairs if name != "none"),
    )
    seen = {"samples": len(inputs), "probe": min(PROBE, len(inputs))}
    policy = otp.Policy(rules=[rule], calibration=seen, seed=seed)
    otp.prune_(small, policy, cifar.batches(inputs), timing=0)
    return small


def baseline(model: nn.Module, spec: Spec, inputs: Tensor, *, removed: int, seed: int) -> nn.Module:
    """Take blocks out without this library."""
    scores = depth_baselines.SCORES[spec.choice](model, inputs, seed=seed)
    gone = depth_baselines.order(scores)[:removed]
    small = depth_baselines.remove(model, gone)
    depth_baselines.repair_(small, model, spec.repair, gone=gone, inputs=inputs)
    return small


SIDES = {"ours": ours, "baseline": baseline}


def measure(bench: Bench, spec: Spec, *, removed: int, seed: int) -> dict[str, Any]:
    """Take blocks out, and read accuracy, size and time.

    Args:
        bench: the network with its images.
        spec: the method.
        removed: how many blocks go.
        seed: of the calibration images and of random choices.

    Returns:
        plain JSON values. `right` tells the images apart that are classified correctly, so that
        methods can be compared image by image; `seconds` excludes evaluation.
    """
    inputs, took, small = bench.calibration(seed), Measured(), bench.model
    _label(bench.model)
    if spec.side != "dense":
        with measured() as took:
            small = SIDES[spec.side](bench.model, spec, inputs, removed=removed, seed=seed)
    gone = _gone(bench.model, small)
    if len(gone) != removed:
        raise ValueError(f"{len(gone)} blocks are gone, not {removed}: {', '.join(gone)}.")
    if bench.right is None:
        bench.right = correct(bench.model, bench.test)
    right = correct(small, bench.test)
    accuracy = 100 * right.double().mean().item()
    return {
        "accuracy": round(accuracy, 3),
        "shown": round(accuracy, 2),
        "lost_images": int((bench.right & ~right).sum()),
        "won_images": int((right & ~bench.right).sum()),
        "test_images": len(bench.test),
        "samples": len(inputs),
        "right": hexed(right),
        "gone": list(gone),
        "blocks": len(depth_baselines.blocks(bench.model)),
        "macs_kept": _share(count_macs, small, bench.model, bench.example),
        "params_kept": _share(count_params, small, bench.model),
        "seconds": round(took.seconds, 3),
        "peak_mib": round(took.peak_mib, 1),
    } | bench.clock(small, gone)


def _label(model: nn.Module) -> None:
    """Write its name into every block: copies keep it, wherever a block moves to."""
    for name in depth_baselines.blocks(model):
        vars(model.get_submodule(name))["origin"] = name


def _gone(dense: nn.Module, small: nn.Module) -> tuple[str, ...]:
    """Name the blocks of the labelled dense network that the small one lacks."""
    left = {vars(m)["origin"] for m in small.modules() if isinstance(m, cifar.BasicBlock)}
    return tuple(name for name in depth_baselines.blocks(dense) if name not in left)


def _share(count: Any, small: nn.Module, dense: nn.Module, *args: Tensor) -> float:
    share: float = count(small, *args) / count(dense, *args)
    return round(share, 4)


def cells(
    bench: Bench, specs: Sequence[Spec], removed: Sequence[int], *, seeds: int
) -> Iterator[Cell]:
    """List the cells of one network, those that can be."""
    most = len(depth_baselines.removable(bench.model))
    yield Cell(bench.net, DENSE, 0, 0, partial(measure, bench, DENSE, removed=0, seed=0))
    for spec, count in itertools.product(specs, removed):
        for seed in range(_draws(spec, seeds) if 0 < count <= most else 0):
            work = partial(measure, bench, spec, removed=count, seed=seed)
            yield Cell(bench.net, spec, count, seed, work)


def _draws(spec: Spec, seeds: int) -> int:
    """Count the seeds that can change a method's result."""
    if (spec.choice, spec.repair) == ("magnitude", "none"):
        return 1
    return max(seeds, RANDOM_DRAWS) if spec.choice == "random" and seeds > 1 else seeds


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--removed", default="1,2,3,4,5,6,7,8,9", help="how many blocks go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--which", default="baselines,ours", help="of baselines, ours")
    parser.add_argument("--only", default="", help="regular expression on choice/repair")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="random data, tiny network, no claim")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    args = parser.parse_args(words)
    if not args.quick and args.data is None:
        parser.error("--data is needed, or --quick.")
    torch.set_num_threads(args.threads)
    specs = [
        s for name in args.which.split(",") for s in _specs(name) if re.search(args.only, s.method)
    ]
    removed = [int(word) for word in args.removed.split(",")]
    question = (__doc__ or "").split("\n\n    ")[0]
    for bench in [quick_bench()] if args.quick else (load_bench(n, args.data) for n in args.nets):
        found = cells(bench, specs, removed, seeds=args.seeds)
        run(found, args.out, question=question, force=args.force)


def _specs(name: str) -> list[Spec]:
    return {"baselines": BASELINES, "ours": OURS}[name]


if __name__ == "__main__":
    main()
