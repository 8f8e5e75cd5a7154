"""How well does each layer criterion foretell what happens when a block goes?

Every removable block of ResNet-20, ResNet-32 and MiniLM is taken out alone, once without repair and
once with the default one, and what that does is read on held-out data. Spearman's rank correlation
compares it with the criterion's score of the block.

Expected before measuring, averaged over the networks and for the change of the loss: without repair
`loss_delta` and `transport` reach 0.8 and no other criterion comes before them; with the default
repair, which `transport` prices and `loss_delta` does not, `transport` comes first.

    python benchmarks/depth_criteria.py --data DATA
    python benchmarks/depth_criteria.py --quick --out /tmp/criteria.json
    python benchmarks/plot_depth_criteria.py

MiniLM and its texts are those of `minilm_depth.py`. Rows are written one by one and skipped when
they are there already.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar, cifar10_depth, minilm_baselines, minilm_depth
from benchmarks.common import measured
from benchmarks.depth_harness import Cell, Spec, run

OUT = Path(__file__).resolve().parent / "results" / "depth_criteria.json"
NETS = ("resnet20", "resnet32", "minilm")
REPAIRS = ("none", "default")
PROBED = 256  # calibration samples run to find a criterion's evidence; the library keeps 64


@dataclass(frozen=True)
class Grade:
    """What a network does on held-out data.

    Args:
        loss: lower is better: cross-entropy, or one minus the cosine to the dense embedding.
        accuracy: percent: top-1, or the share of each text's ten nearest neighbours kept.
        output: what it puts out, samples x features.
        right: for each sample whether its class is found; empty without classes.
    """

    loss: float
    accuracy: float
    output: Tensor
    right: Tensor

    def error(self, dense: Grade) -> float:
        """Divide the RMS of the output's change by the RMS of the dense output."""
        moved, whole = (self.output - dense.output).double(), dense.output.double()
        return float(moved.norm() / whole.norm())


class Data(Protocol):
    """Calibration data, and held-out data to judge a network on."""

    def calibration(self, seed: int) -> Sequence[Any]:
        """Draw the batches that a method may see."""

    def grade(self, model: nn.Module, seed: int) -> Grade:
        """Judge a network on data that the same seed's calibration did not draw."""


@dataclass
class Images:
    """Labelled images.

    Args:
        train: training images; both parts come from them, test images play no role.
        samples: for calibration.
    """

    train: cifar.Split
    samples: int = cifar.CALIBRATION

    def calibration(self, seed: int) -> Sequence[Tensor]:
        """Draw the batches that a method may see."""
        return cifar.batches(cifar.draw(self.train, seed, self.samples)[0].inputs())

    def held_out(self, seed: int) -> cifar.Split:
        """Take up to 5 000 of the other training images."""
        return cifar.draw(self.train, seed, self.samples)[1]

    def grade(self, model: nn.Module, seed: int) -> Grade:
        """Judge a network on the held-out images."""
        return grade(model, self.held_out(seed))


@torch.inference_mode()
def grade(model: nn.Module, split: cifar.Split) -> Grade:
    """Judge a classifier on labelled images."""
    logits = torch.cat([model.eval()(x) for x in split.inputs().split(256)])
    right = logits.argmax(dim=1) == split.labels
    loss = float(F.cross_entropy(logits.double(), split.labels))
    return Grade(loss, 100 * float(right.double().mean()), logits, right)


@dataclass
class Texts:
    """Sentences, and the dense encoder that embeds them.

    Args:
        bench: the encoder with its texts.
    """

    bench: minilm_depth.Bench
    wanted: dict[int, Tensor] = field(default_factory=dict)

    def calibration(self, seed: int) -> Sequence[minilm_baselines.Batch]:
        """Take the seed's calibration texts."""
        return self.bench.batches["calibration", seed]

    def grade(self, model: nn.Module, seed: int) -> Grade:
        """Compare embeddings of the seed's validation texts with the dense model's."""
        texts = self.bench.batches["validation", seed]
        if seed not in self.wanted:
            self.wanted[seed] = minilm_baselines.embed(self.bench.model, texts)
        found = minilm_baselines.embed(model, texts)
        kept = minilm_depth.fidelity(found, self.wanted[seed])["top10"]
        cosine = (found * self.wanted[seed]).sum(dim=1).double().mean()
        return Grade(1 - float(cosine), kept, found, torch.empty(0).bool())


@dataclass
class Bench:
    """One network with its data.

    Args:
        net: its name in the results.
        model: dense.
        data: to calibrate on and to be judged on.
    """

    net: str
    model: nn.Module
    data: Data
    dense: dict[int, Grade] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Name the blocks that can go, in order, as `targets='auto'` reaches them."""
        import torch_otprune as otp

        if not self.names:
            example, policy = self.data.calibration(0)[0], otp.Policy(rules=otp.Layers(drop=1))
            with otp.attach(self.model, policy, example=example) as attached:
                assert attached.graph is not None
                found = attached.graph.blocks
            self.names = tuple(block.name for block in found if block.level == "layer")
        return self.names

    def before(self, seed: int) -> Grade:
        """Judge the dense network."""
        if seed not in self.dense:
            self.dense[seed] = self.data.grade(self.model, seed)
        return self.dense[seed]


def thinned(batches: Sequence[Any], samples: int = PROBED) -> Sequence[Any]:
    """Take about so many samples, evenly spread: texts are sorted by length."""
    sizes = [len(b if isinstance(b, Tensor) else b["input_ids"]) for b in batches]
    return batches[:: max(1, sum(sizes) // samples)]


def score(bench: Bench, kind: str, seed: int) -> dict[str, Any]:
    """Let a criterion score every block, each as if it went alone.

    Args:
        bench: the network with its data.
        kind: the criterion, with its default settings.
        seed: of the calibration data and of the policy.

    Returns:
        plain JSON values; larger scores mean keep. `seconds` is everything from attaching to the
        scores of all blocks, `scoring` the part after the statistics were gathered.
    """
    import torch_otprune as otp
    from torch_otprune.criteria.layers import LayerCriterion
    from torch_otprune.policy.registry import LAYER_CRITERIA

    rule, batches = otp.Layers(criterion=kind, drop=1), thinned(bench.data.calibration(seed))
    policy = otp.Policy(rules=rule, calibration=otp.Calibration(samples=2 * PROBED), seed=seed)
    blocks, criterion = bench.blocks, LAYER_CRITERIA.resolve(kind)
    assert isinstance(criterion, LayerCriterion)
    with measured() as took:
        with otp.attach(bench.model, policy) as attached:
            otp.observe(attached, batches)
            seen = attached.observation()
        start = time.perf_counter()
        # A chain of one: what the block costs alone, whatever else the criterion would take.
        found = [float(criterion.rank(seen.chain([block])).curve[0]) for block in blocks]
        scoring = time.perf_counter() - start
    scores = {block: float(f"{value:.8e}") for block, value in zip(blocks, found, strict=True)}
    return {
        "scores": scores,
        "seconds": round(took.seconds, 3),
        "scoring": round(scoring, 3),
        "peak_mib": round(took.peak_mib, 1),
        "shown": " ".join(f"{value:.2g}" for value in found),
    }


def remove(bench: Bench, block: str, repair: str, seed: int) -> nn.Module:
    """Take one block out with the library.

    Args:
        bench: the network with its data.
        block: what goes.
        repair: `none`, where its input is handed on and nothing mended, or `default`.
        seed: of the calibration data.

    Returns:
        the smaller network; the dense one is left alone.
    """
    import torch_otprune as otp

    small, batches = copy.deepcopy(bench.model), bench.data.calibration(seed)
    mend: dict[str, Any] = {}
    if repair == "none":  # one batch to trace the network on is all that this reads
        mend, batches = {"replace": "identity", "repair": ()}, batches[:1]
    # With one target and drop=1 there is nothing to choose; `random` looks at no data for it.
    rule = otp.Layers(targets=(block,), drop=1, criterion="random", **mend)
    samples = sum(len(b if isinstance(b, Tensor) else b["input_ids"]) for b in batches)
    calibration = otp.Calibration(samples=samples)
    policy = otp.Policy(rules=rule, calibration=calibration, seed=seed)
    otp.prune_(small, policy, batches, timing=0)
    return small


def truth(bench: Bench, block: str, repair: str, seed: int) -> dict[str, Any]:
    """Take one block out and read on held-out data what that does.

    Args:
        bench: the network with its data.
        block: what goes.
        repair: `none` or `default`.
        seed: of the calibration data and of what is held out.

    Returns:
        plain JSON values. All changes are larger where more is lost: of the loss, of the accuracy
        in points, of the output as a share of its RMS.
    """
    with measured() as took:
        small = remove(bench, block, repair, seed)
    before, after = bench.before(seed), bench.data.grade(small, seed)
    return {
        "block": block,
        "loss_change": round(after.loss - before.loss, 6),
        "accuracy_change": round(before.accuracy - after.accuracy, 4),
        "output_error": round(after.error(before), 6),
        "held_out": len(after.output),
        "seconds": round(took.seconds, 3),
        "shown": round(after.loss - before.loss, 4),
    }


def reference(bench: Bench, seed: int) -> dict[str, Any]:
    """Judge the dense network."""
    found = bench.before(seed)
    return {
        "loss": round(found.loss, 6),
        "accuracy": round(found.accuracy, 4),
        "held_out": len(found.output),
        "blocks": list(bench.blocks),
        "shown": round(found.loss, 4),
    }


def cells(bench: Bench, *, seeds: int, which: Sequence[str], only: str) -> Iterator[Cell]:
    """List the cells of one network: the dense one, scores, and what really happens.

    Args:
        bench: the network with its data.
        seeds: how many.
        which: of `scores` and `truth`.
        only: regular expression on criteria.

    Yields:
        cells, seed by seed.
    """
    from torch_otprune.policy.registry import LAYER_CRITERIA

    for seed in range(seeds):
        yield Cell(bench.net, Spec("dense"), 0, seed, partial(reference, bench, seed))
        for kind in (k for k in LAYER_CRITERIA if "scores" in which and re.search(only, k)):
            yield Cell(bench.net, Spec("score", kind), 0, seed, partial(score, bench, kind, seed))
        for block in bench.blocks if "truth" in which else ():
            for repair in REPAIRS:
                work = partial(truth, bench, block, repair, seed)
                yield Cell(bench.net, Spec("truth", block, repair), 1, seed, work)


def load_bench(net: str, data: Path | None, *, seeds: int, texts: int) -> Bench:
    """Load a trained network with its data.

    Args:
        net: of `NETS`.
        data: folder of images and weights; MiniLM needs none.
        seeds: how many draws of texts.
        texts: calibration texts.

    Returns:
        the bench.
    """
    if net == "minilm":
        encoder = minilm_depth.load_bench(seeds, texts)
        return Bench(encoder.net, encoder.model, Texts(encoder))
    assert data is not None
    train = cifar.load_split(data, cifar.NETS[net].images, "train")
    return Bench(net, cifar.load_net(net, data), Images(train))


def quick_bench() -> Bench:
    """Build a tiny untrained network and random images, to try the harness without data."""
    tiny = cifar10_depth.quick_bench()
    return Bench(tiny.net, tiny.model, Images(tiny.train, tiny.samples))


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=minilm_depth.CALIBRATION)
    parser.add_argument("--which", default="scores,truth", help="of scores, truth")
    parser.add_argument("--only", default="", help="regular expression on criteria")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="random data, tiny network, no claim")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    args = parser.parse_args(words)
    if not args.quick and args.data is None and set(args.nets) != {"minilm"}:
        parser.error("--data is needed, or --quick.")
    torch.set_num_threads(args.threads)
    load = partial(load_bench, data=args.data, seeds=args.seeds, texts=args.texts)
    question = (__doc__ or "").split("\n\n    ")[0]
    for bench in [quick_bench()] if args.quick else map(load, args.nets):
        found = cells(bench, seeds=args.seeds, which=args.which.split(","), only=args.only)
        run(found, args.out, question=question, force=args.force)


if __name__ == "__main__":
    main()
