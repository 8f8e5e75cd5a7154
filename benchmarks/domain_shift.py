"""How much of a domain shift can folded transport take back, without a label of the new domain?

He et al.'s ResNet-20 was trained on CIFAR-10 as published; here it meets the same kind of pictures
after JPEG compression. Every method sees images of both domains and no label of the new one;
nothing is trained. Expected before measuring: matching means and variances layer by layer, in
order, is worth as much as batch-norm re-estimation within half a point; covariances of whole
patches add one point; where both domains show the same scenes and transport finds out which belong
together, a regression takes back more than half of the loss.

    python benchmarks/domain_shift.py --data DATA
    python benchmarks/domain_shift.py --quick --out /tmp/shift.json
    python benchmarks/plot_maps.py

Rows are written one by one and skipped when they are there already. Accuracies on validation images
are too high, because the network was trained on what they show; they rank methods and no more.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar
from benchmarks.common import Measured, measured
from benchmarks.depth_harness import Cell, Spec, run

OUT = Path(__file__).resolve().parent / "results" / "domain_shift.json"
SURE = 0.5  # the nearest scene is at most this far, relative to the second nearest
HELD = 2000


@dataclass
class Bench:
    """A network between two domains.

    Args:
        net: its name in the results.
        model: trained at home.
        home: labelled images of its own domain.
        away: images of the new domain; labels are for validation alone.
        test: of the new domain, for the final accuracy alone.
        samples: of each domain that a method may see.
        tuned: a network that was fine-tuned with the new domain's labels, to compare with.
    """

    net: str
    model: nn.Module
    home: cifar.Split
    away: cifar.Split
    test: cifar.Split
    samples: int = cifar.CALIBRATION
    tuned: nn.Module | None = None
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def drawn(self, seed: int) -> tuple[cifar.Split, cifar.Split]:
        """Draw what a method may see of home and away."""
        home = cifar.draw(self.home, seed, self.samples)[0]
        return home, cifar.draw(self.away, seed, self.samples)[0]

    def held(self, seed: int) -> cifar.Split:
        """Hold images of the new domain out."""
        rest = cifar.draw(self.away, seed, self.samples)[1]
        return rest.pick(torch.arange(min(HELD, len(rest))))

    def matched(self, seed: int, most: int | None = None) -> tuple[cifar.Split, cifar.Split]:
        """Find scenes that both domains show, by the cheapest semi-relaxed plan of thumbnails.

        Every home image goes to its nearest one away; only clear cases stay. Validation images
        are not looked at, and no label is.
        """
        if seed not in self.found:
            order = torch.randperm(len(self.away), generator=torch.Generator().manual_seed(seed))
            seen = torch.cat([order[: self.samples], order[self.samples + cifar.VALIDATION :]])
            near = _nearest(self.home, self.away.pick(seen))
            self.found[seed] = near[0], seen[near[1]]
        home, away = (at[: most or self.samples] for at in self.found[seed])
        return self.home.pick(home), self.away.pick(away)


def _nearest(home: cifar.Split, away: cifar.Split) -> tuple[Tensor, Tensor]:
    """List clear matches: rows of both."""
    x, y = _thumbnails(home), _thumbnails(away)
    best = [torch.cdist(rows, y).topk(2, largest=False) for rows in x.split(256)]
    apart, at = (torch.cat([b[i] for b in best]) for i in (0, 1))
    clear = apart[:, 0] < SURE * apart[:, 1]
    return clear.nonzero().flatten(), at[clear, 0]


def _thumbnails(split: cifar.Split) -> Tensor:
    parts = split.images.split(4096)
    return torch.cat([F.avg_pool2d(part.float(), 4).flatten(1) for part in parts])


def load_bench(data: Path) -> Bench:
    """Load ResNet-20 and both kinds of images."""
    home, away = (cifar.load_split(data, kind, "train") for kind in ("original", "jpeg"))
    test = cifar.load_split(data, "jpeg", "test")
    nets = [cifar.load_net(name, data) for name in ("resnet20", "resnet20-jpeg")]
    return Bench("resnet20", nets[0], home, away, test, tuned=nets[1])


def quick_bench() -> Bench:
    """Build a tiny untrained network and random images; the new domain is coarser."""
    torch.manual_seed(0)
    model = cifar.ResNet(blocks=1, width=8).eval()
    coarse = torch.randint(0, 256, (160, 3, 4, 4), dtype=torch.uint8)
    pixels = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    home = cifar.Split(pixels, torch.randint(0, 10, (160,)))
    away = cifar.Split(pixels - pixels % 32, home.labels)
    return Bench("tiny", model, home, away, away.pick(torch.arange(64)), samples=64, tuned=model)


Method = Callable[[nn.Module, Bench, int], None]


def nothing_(model: nn.Module, bench: Bench, seed: int) -> None:
    """Leave the network as it is."""


@torch.no_grad()
def renorm_(model: nn.Module, bench: Bench, seed: int, *, augment: bool = False) -> None:
    """Re-estimate every batch-norm on the new domain, all at once.

    `augment` shifts and mirrors the images as training did: its zero borders are part of what the
    old statistics know.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    away = bench.drawn(seed)[1]
    if augment:
        away = cifar._augment(away, torch.Generator().manual_seed(seed))
    for batch in cifar.batches(away.inputs()):
        model(batch)
    model.eval()


def folded_(model: nn.Module, bench: Bench, seed: int, **settings: Any) -> None:
    """Fold unpaired maps into every layer, front to back."""
    from torch_otprune.repair.domain import adapt_

    side = settings.pop("side")
    home, away = (cifar.batches(part.inputs()) for part in bench.drawn(seed))
    adapt_(model, home, away, map={"kind": "domain_map"} | settings, side=side, seed=seed)


def regressed_(
    model: nn.Module, bench: Bench, seed: int, *, side: str, most: int | None = None
) -> None:
    """Fold regressions of pairs that transport found."""
    from torch_otprune.repair.domain import adapt_

    home, away = (cifar.batches(part.inputs()) for part in bench.matched(seed, most))
    adapt_(model, home, away, side=side, paired=True, seed=seed)  # type: ignore[arg-type]


def classes_(model: nn.Module, bench: Bench, seed: int, *, classes: float) -> None:
    """Match variances, then map what the last layer reads, by a plan that knows home classes."""
    from torch_otprune.maps import DomainMap

    folded_(model, bench, seed, side="out", method="diagonal")
    home, away = bench.drawn(seed)
    there, here = _features(bench.model, home), _features(model, away)
    made = DomainMap(method="coupled", classes=classes)
    made.fit(here, there, labels=home.labels).fold_into(model.linear, side="in")


@torch.no_grad()
def _features(model: Any, split: cifar.Split) -> Tensor:
    """Give what the last layer reads."""
    seen: list[Tensor] = []
    hook = model.linear.register_forward_pre_hook(_Keep(seen))
    for batch in cifar.batches(split.inputs()):
        model.eval()(batch)
    hook.remove()
    return torch.cat(seen)


@dataclass
class _Keep:
    seen: list[Tensor]

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.append(args[0].detach())


METHODS: dict[str, Method] = {
    "nothing": nothing_,
    "batch-norm re-estimation": renorm_,
    "batch-norm re-estimation, augmented": partial(renorm_, augment=True),
    "variances, out": partial(folded_, side="out", method="diagonal"),
    "covariances, out": partial(folded_, side="out", method="bures"),
    "variances, out + coupled with home classes": partial(classes_, classes=0.1),
    "pairs found by transport, out": partial(regressed_, side="out"),
    "pairs found by transport, in": partial(regressed_, side="in"),
    "all pairs found by transport, out": partial(regressed_, side="out", most=10**6),
    "all pairs found by transport, in": partial(regressed_, side="in", most=10**6),
    "variances, in": partial(folded_, side="in", method="diagonal"),
    "covariances, in": partial(folded_, side="in", method="bures"),
    "plan without pairs, in": partial(folded_, side="in", method="coupled"),
    "monge_map, out": partial(folded_, side="out", kind="monge_map"),
}
TUNED = "fine-tuned with labels, 1.5 epochs of 50 000 images"


def measure(bench: Bench, name: str, *, seed: int) -> dict[str, Any]:
    """Adapt a copy and read its accuracy.

    Args:
        bench: the network between its domains.
        name: of the method.
        seed: of the images.

    Returns:
        plain JSON values; `seconds` excludes evaluation and includes finding pairs.
    """
    took, model = Measured(), copy.deepcopy(bench.model)
    bench.found.clear()  # or only the first method would pay for finding pairs
    if name == TUNED:
        assert bench.tuned is not None
        model = bench.tuned
    else:
        with measured() as took:
            METHODS[name](model, bench, seed)
    test = cifar.accuracy(model, bench.test)
    return {
        "test": round(test, 3),
        "shown": round(test, 2),
        "validation": round(cifar.accuracy(model, bench.held(seed)), 3),
        "seconds": round(took.seconds, 2),
        "samples": bench.samples,
        "pairs": len(bench.found[seed][0]) if seed in bench.found else 0,
        "test_images": len(bench.test),
    }


def cells(bench: Bench, names: Sequence[str], *, seeds: int) -> Iterator[Cell]:
    """List the cells."""
    yield Cell(bench.net, Spec("dense", TUNED), 0, 0, partial(measure, bench, TUNED, seed=0))
    for seed in range(seeds):
        for name in names:
            spec = Spec("baseline" if name in list(METHODS)[:3] else "ours", name)
            yield Cell(bench.net, spec, 0, seed, partial(measure, bench, name, seed=seed))


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--methods", default="", help="names, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="random data, tiny network, no claim")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    args = parser.parse_args(words)
    if not args.quick and args.data is None:
        parser.error("--data is needed, or --quick.")
    torch.set_num_threads(args.threads)
    bench = quick_bench() if args.quick else load_bench(args.data)
    names = [n for n in args.methods.split(";") if n] or list(METHODS)
    question = (__doc__ or "").split("\n\n    ")[0]
    run(cells(bench, names, seeds=args.seeds), args.out, question=question, force=args.force)


if __name__ == "__main__":
    main()
