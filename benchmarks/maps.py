"""Which transport map makes up best for removed blocks, and what does a map cost?

Blocks of a ResNet, or layers of MiniLM, go; every map then carries what the layer in front writes
onto what stood behind the gap, and is folded into that layer. No other repair runs, nothing is
trained, no label is read. Expected before measuring: with pairs no map beats plain least squares by
more than its noise, because a small Monge gap is worth nothing where the same input runs through
both networks; without pairs none beats the closed Bures map by more than one point; a quarter of
the channels recovers at least half of what all of them do.

    python benchmarks/maps.py --data DATA
    python benchmarks/maps.py --quick --out /tmp/maps.json
    python benchmarks/plot_maps.py

Rows are written one by one and skipped when they are there already.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar, depth_baselines, minilm_baselines, minilm_depth
from benchmarks.depth_harness import Cell, Spec, run

OUT = Path(__file__).resolve().parent / "results" / "maps.json"
REMOVED = {"resnet20": 2, "resnet32": 4, "tiny": 1, "all-MiniLM-L6-v2": 1, "tiny-bert": 1}
HELD = 2000  # validation images
TEXTS = 512


def mapped(kind: str, **settings: Any) -> dict[str, Any]:
    """Declare a replacement by any transport map, with the pairs that are known."""
    return {"kind": "transport_map", "map": {"kind": kind, **settings}}


def unpaired(kind: str, **settings: Any) -> dict[str, Any]:
    """The same without pairs: laws alone."""
    return mapped(kind, **settings) | {"paired": False}


# What is declared, by the name in the table; `pairs` or `laws` says what is known.
MAPS: dict[str, Any] = {
    "nothing": "identity",
    "least squares of the whole layer, pairs": "affine",
    "affine, pairs": mapped("affine"),
    "affine, laws": unpaired("affine"),
    "monge_map squared, pairs": mapped("monge_map"),
    "monge_map euclidean, pairs": mapped("monge_map", cost="euclidean"),
    "monge_map elastic, pairs": mapped("monge_map", cost="elastic"),
    "monge_map squared, laws": unpaired("monge_map"),
    "sparse_map 1/4, pairs": mapped("sparse_map", budget=0.25),
    "sparse_map 1/2, pairs": mapped("sparse_map", budget=0.5),
    "sparse_map 1/2, laws": unpaired("sparse_map", budget=0.5),
    "domain_map diagonal, laws": unpaired("domain_map", method="diagonal"),
    "domain_map coupled, laws": unpaired("domain_map", method="coupled"),
    "flow sinkhorn, laws": unpaired("flow"),
    "flow jsd, laws": unpaired("flow", energy="jsd"),
    # These stay in the block's place instead of being folded.
    "low_rank 16 in its place, pairs": {"kind": "low_rank", "rank": 16},
    "monge_net 32 in its place, pairs": {"kind": "monge_net", "hidden": 32},
}


@dataclass
class Pictures:
    """A ResNet with its images.

    Args:
        net: its name in the results.
        model: dense.
        train: images that calibration and validation are drawn from.
        test: for the final accuracy alone.
        samples: images that a method may see.
    """

    net: str
    model: nn.Module
    train: cifar.Split
    test: cifar.Split
    samples: int = cifar.CALIBRATION

    def batches(self, seed: int) -> list[Any]:
        """Draw what a method may see."""
        inputs = cifar.draw(self.train, seed, self.samples)[0].inputs()
        return list(cifar.batches(inputs))

    def gone(self) -> tuple[str, ...]:
        """Choose blocks that change their input least, of those with a layer in front to fold into.

        The images are of no seed that is measured.
        """
        from torch_otprune.structure import trace

        inputs = cifar.draw(self.train, 99, min(self.samples, 256))[0].inputs()
        scores = depth_baselines.block_influence(self.model, inputs, seed=0)
        ready = {block.name for block in trace(self.model, inputs[:2]).blocks if block.front}
        names = [name for name in depth_baselines.order(scores) if name in ready]
        return tuple(names[: REMOVED[self.net]])

    def copied(self) -> nn.Module:
        """Copy the dense network."""
        return copy.deepcopy(self.model)

    def judge(self, small: nn.Module, seed: int) -> dict[str, float]:
        """Read accuracies, in percent."""
        held = cifar.draw(self.train, seed, self.samples)[1]
        held = held.pick(torch.arange(min(HELD, len(held))))
        test, validation = (cifar.accuracy(small, split) for split in (self.test, held))
        return {"test": round(test, 3), "validation": round(validation, 3), "shown": round(test, 2)}


@dataclass
class Texts:
    """MiniLM with its texts.

    Args:
        bench: of `minilm_depth`.
    """

    bench: minilm_depth.Bench

    @property
    def net(self) -> str:
        """Name it."""
        return "tiny-bert" if self.bench.net == "tiny" else self.bench.net

    def batches(self, seed: int) -> list[Any]:
        """Hand out calibration texts."""
        return list(self.bench.batches["calibration", seed])

    def gone(self) -> tuple[str, ...]:
        """Choose the layers that change their input least."""
        chosen = minilm_baselines.block_influence(
            self.bench.model,
            REMOVED[self.net],
            calibration=self.bench.batches["validation", 0],
            validation=[],
        )
        return tuple(f"bert.encoder.layer.{i}" for i in chosen)

    def copied(self) -> nn.Module:
        """Copy the encoder, with the pooling that its users read."""
        return minilm_depth.Sentences(copy.deepcopy(self.bench.model))

    def judge(self, small: Any, seed: int) -> dict[str, float]:
        """Read the mean cosine to the dense embedding, times 100."""
        found = {}
        for name, part in (("test", ("test", 0)), ("validation", ("validation", seed))):
            batches = self.bench.batches[part]
            want = minilm_baselines.embed(self.bench.model, batches)
            got = minilm_baselines.embed(small.bert, batches)
            found[name] = round(100 * (got * want).sum(1).double().mean().item(), 3)
        return found | {"shown": found["test"]}


Bench = Pictures | Texts


def measure(bench: Bench, spec: Spec, *, gone: Sequence[str], seed: int) -> dict[str, Any]:
    """Take blocks out, fold one map per gap, and read what is left.

    Args:
        bench: the network with its data.
        spec: `choice` names the map.
        gone: what goes.
        seed: of calibration and validation data.

    Returns:
        plain JSON values; `seconds` is the whole of apply, `notes` what every map reports.
    """
    import torch_otprune as otp

    small = bench.copied()
    if spec.side == "dense":
        return {**bench.judge(small, seed), "seconds": 0.0, "notes": [], "gone": []}
    rule = otp.Layers(
        targets=tuple(gone), drop=len(gone), criterion="magnitude", replace=MAPS[spec.choice],
        repair=(),
    )  # fmt: skip
    batches = bench.batches(seed)
    seen = {"samples": sum(map(_size, batches))}
    policy = otp.Policy(rules=[rule], calibration=seen, seed=seed)
    with otp.attach(small, policy) as attached, torch.no_grad():
        for batch in batches:
            small(batch) if isinstance(batch, Tensor) else small(**batch)
        plan = attached.plan()
    start = time.perf_counter()
    report = otp.apply_(small, plan, batches, timing=0)
    took = time.perf_counter() - start
    return {
        **bench.judge(small, seed),
        "seconds": round(took, 3),
        "output_error": report.output_error and report.output_error.after_repair,
        "gone": list(gone),
        "notes": [
            {"site": n.site, "before": n.before, "after": n.after, "accepted": n.accepted,
             "note": n.note}
            for n in report.repairs
        ],
    }  # fmt: skip


def _size(batch: Any) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(batch["input_ids"])


def cells(bench: Bench, names: Sequence[str], *, seeds: int) -> Iterator[Cell]:
    """List the cells of one network."""
    gone = bench.gone()
    dense = Spec("dense")
    yield Cell(bench.net, dense, 0, 0, partial(measure, bench, dense, gone=gone, seed=0))
    for seed in range(seeds):
        for name in names:
            spec = Spec("ours", name)
            work = partial(measure, bench, spec, gone=gone, seed=seed)
            yield Cell(bench.net, spec, len(gone), seed, work)


def benches(nets: Sequence[str], data: Path, *, seeds: int) -> Iterator[Bench]:
    """Load one network after the other."""
    for net in nets:
        if net == "minilm":
            yield Texts(minilm_depth.load_bench(seeds, TEXTS))
        else:
            images = cifar.NETS[net].images
            train, test = (cifar.load_split(data, images, part) for part in ("train", "test"))
            yield Pictures(net, cifar.load_net(net, data), train, test)


def quick_benches(texts: bool) -> Iterator[Bench]:
    """Build tiny untrained networks, to try the harness without data."""
    from benchmarks.cifar10_depth import quick_bench

    tiny = quick_bench()
    yield Pictures("tiny", tiny.model, tiny.train, tiny.test, samples=64)
    if texts:
        yield Texts(minilm_depth.quick_bench())


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--nets", default="resnet20,resnet32,minilm")
    parser.add_argument("--maps", default="", help="names of maps, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="random data, tiny network, no claim")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    args = parser.parse_args(words)
    if not args.quick and args.data is None:
        parser.error("--data is needed, or --quick.")
    torch.set_num_threads(args.threads)
    names = [n for n in args.maps.split(";") if n] or list(MAPS)
    nets = args.nets.split(",")
    found = (
        quick_benches("minilm" in nets)
        if args.quick
        else benches(nets, args.data, seeds=args.seeds)
    )
    question = (__doc__ or "").split("\n\n    ")[0]
    for bench in found:
        run(cells(bench, names, seeds=args.seeds), args.out, question=question, force=args.force)


if __name__ == "__main__":
    main()
