"""Which weight method loses least of an MLP on CIFAR-10, in one shot and without training?

An MLP 192-256-256-10 on images pooled to 8 x 8, trained anew for every seed; all three layers keep
half, 30 % or 10 % of their weights, or two of every four. Criteria see 1 024 unlabelled training
images. Published recipes stand beside ours: mask alone, or the layer's own answers to its pruned
inputs (`sequential`); ours fit to the dense network's answers (`cascade`).

Expected: `alps` in a cascade has the least test loss everywhere, and the refit is worth more than
the choice of weights. Net-Trim, which is there for its bound, is behind both at one density.

    python benchmarks/weights_mlp_cifar.py --data DATA
    python benchmarks/weights_mlp_cifar.py --quick --out /tmp/weights.json

Test images are the 10 000 JPEG copies, which nothing was tuned on; `--split validation` judges on
5 000 training images held out of training, for decisions. Rows are written one by one and skipped
when they are there already; a table and a picture follow at the end.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_otprune as otp
from benchmarks import cifar
from benchmarks.common import Panel, environment, markdown, read_json, save_picture, write_json

OUT = Path(__file__).resolve().parent / "results" / "weights_mlp_cifar.json"
HELD, SIDE, SIZE = 5000, 8, 256
ZEROS = ("50", "70", "90", "2:4")
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"kind": "magnitude"},
    "magnitude, refit": {"kind": "magnitude", "refit": True},
    "wanda": {"kind": "wanda"},
    "wanda, refit": {"kind": "wanda", "refit": True},
    "ntk": {"kind": "ntk"},
    "ntk, refit": {"kind": "ntk", "refit": True},
    "sparsegpt, sequential": {"kind": "sparsegpt", "mode": "sequential"},
    "sparsegpt, cascade": {"kind": "sparsegpt"},
    "alps, sequential": {"kind": "alps", "mode": "sequential"},
    "alps, cascade": {"kind": "alps"},
    "alps, parallel": {"kind": "alps", "mode": "parallel"},
    "net_trim, cascade": {"kind": "net_trim"},
    "net_trim, parallel": {"kind": "net_trim", "mode": "parallel"},
}
PUBLISHED = ("magnitude", "wanda", "sparsegpt, sequential", "alps, sequential")


class Pooled(nn.Module):
    """An MLP on small pictures.

    Args:
        side: pixels of one edge.
        hidden: width of both hidden layers.
    """

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        self.side = side
        self.fc1 = nn.Linear(3 * side * side, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map N x 3 x H x W to N x 10 logits."""
        x = F.adaptive_avg_pool2d(x, self.side).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Lab:
    """Images, how long to train on them, and who is judged on what.

    Args:
        train: images for training and calibration.
        judge: images that judge.
        hidden: width of the MLP.
        epochs: passes over the training images.
        samples: images that a criterion sees.
    """

    train: cifar.Split
    judge: cifar.Split
    hidden: int = SIZE
    epochs: int = 12
    samples: int = 1024

    @cached_property
    def small(self) -> Tensor:
        """Pool all training images once."""
        whole = torch.arange(len(self.train)).split(2048)
        return torch.cat(
            [F.adaptive_avg_pool2d(self.train.pick(i).inputs(), SIDE) for i in whole]
        ).contiguous()

    def net(self, seed: int) -> Pooled:
        """Train an MLP."""
        torch.manual_seed(seed)
        model = Pooled(SIDE, self.hidden)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
        size = 256
        steps = max(1, self.epochs * len(self.train) // size)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=3e-3, total_steps=steps + 1)
        for _ in range(steps):
            index = torch.randint(0, len(self.train), (size,))
            loss = F.cross_entropy(model(self.small[index]), self.train.labels[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
            cycle.step()
        return model.eval()

    def images(self, seed: int) -> Sequence[Tensor]:
        """Draw what criteria see."""
        generator = torch.Generator().manual_seed(1000 + seed)
        index = torch.randperm(len(self.train), generator=generator)[: self.samples]
        return cifar.batches(self.train.pick(index).inputs())


def rule(method: str, zeros: str) -> otp.Weights:
    """Declare one method: so many percent of zeros, or a pattern."""
    if ":" in zeros:
        return otp.Weights(pattern=zeros, criterion=METHODS[method])
    return otp.Weights(keep=f"{100 - int(zeros)}%", criterion=METHODS[method])


def row(lab: Lab, model: Pooled, method: str, zeros: str, *, seed: int) -> dict[str, Any]:
    """Prune a copy of a network and judge it."""
    pruned, images = copy.deepcopy(model), lab.images(seed)
    policy = otp.Policy(rules=[rule(method, zeros)], seed=seed)
    start = time.perf_counter()
    report = otp.prune_(pruned, policy, images, timing=0)
    seconds = time.perf_counter() - start
    top1, loss = cifar.judged(pruned, lab.judge)
    bound = report.bound
    return {
        "method": method,
        "zeros": zeros,
        "seed": seed,
        "accuracy": top1,
        "loss": loss,
        "left": sum(z.left for z in report.zeros) / sum(z.weights for z in report.zeros),
        "error": report.output_error.after_repair,
        "bound": None if bound is None else bound.certified,
        "seconds": round(report.seconds["weights"], 2),
        "wall": round(seconds, 2),
    }


def run(lab: Lab, out: Path, *, seeds: Sequence[int], only: str, force: bool) -> dict[str, Any]:
    """Measure what is not there yet, and write after every row."""
    payload = read_json(out)
    again = {m for m in METHODS if only in m} if force else set()
    rows = [r for r in payload.get("rows", []) if r["method"] not in again]
    done = {(r["method"], r["zeros"], r["seed"]) for r in rows}
    for seed in seeds:
        todo = [(m, z) for z in ZEROS for m in METHODS if only in m and (m, z, seed) not in done]
        if not todo:
            continue
        model = lab.net(seed)
        top1, loss = cifar.judged(model, lab.judge)
        if ("dense", "0", seed) not in done:
            rows.append(
                {"method": "dense", "zeros": "0", "seed": seed, "accuracy": top1, "loss": loss}
            )
        for method, zeros in todo:
            made = environment()
            rows.append(row(lab, model, method, zeros, seed=seed) | {"commit": made["commit"]})
            payload = {"environment": made, "rows": rows}
            write_json(out, payload)
            print(rows[-1], flush=True)
    return payload


Place = tuple[str, str]  # method, zeros


def summarised(payload: Mapping[str, Any]) -> dict[Place, dict[str, tuple[float, float]]]:
    """Average over seeds: mean and standard deviation by method, zeros and measure."""
    found: dict[Place, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in payload["rows"]:
        for name in ("accuracy", "loss", "seconds"):
            if name in r:
                found[r["method"], r["zeros"]][name].append(r[name])
    return {
        place: {
            name: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
            for name, values in measures.items()
        }
        for place, measures in found.items()
    }


def table(payload: Mapping[str, Any]) -> str:
    """Write test accuracy and loss, one line per method."""
    told = summarised(payload)
    accuracy, loss = told["dense", "0"]["accuracy"], told["dense", "0"]["loss"]
    dense = f"{accuracy[0]:.2f} / {loss[0]:.3f}"
    rows = [["dense", "", *[dense] * len(ZEROS), ""]]
    for method in METHODS:
        cells = []
        for zeros in ZEROS:
            if (method, zeros) in told:
                own = told[method, zeros]
                cells.append(f"{own['accuracy'][0]:.2f} / {own['loss'][0]:.3f}")
            else:
                cells.append("–")
        times = [told[method, z]["seconds"][0] for z in ZEROS if (method, z) in told]
        recipe = "published" if method in PUBLISHED else "ours"
        if times:
            rows.append([method, recipe, *cells, f"{statistics.mean(times):.1f}"])
    heads = [f"{z} % zeros" if z.isdecimal() else z for z in ZEROS]
    return markdown(["method", "recipe", *heads, "seconds"], rows)


def picture(payload: Mapping[str, Any], path: Path) -> None:
    """Draw loss and accuracy over the share of zeros."""
    told = summarised(payload)
    dense = told["dense", "0"]
    panels = []
    for name, title in (("loss", "cross-entropy"), ("accuracy", "top-1, %")):
        series = {
            method: [
                (float(z), *told[method, z][name])
                for z in ZEROS
                if z.isdecimal() and (method, z) in told
            ]
            for method in METHODS
        }
        kept = {method: points for method, points in series.items() if points}
        panels.append(Panel(title, kept, dense[name][0]))
    save_picture(path, panels, x="zeros, %", y="")


def load(data: Path, split: str) -> Lab:
    """Read the images; 5 000 of training judge on the way, and never train."""
    whole = cifar.load_split(data, "jpeg", "train")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(7))
    held = whole.pick(order[:HELD])
    judge = held if split == "validation" else cifar.load_split(data, "jpeg", "test")
    return Lab(whole.pick(order[HELD:]), judge)


def quick() -> Lab:
    """Make few random images: does it run?"""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (320, 3, 16, 16), generator=generator, dtype=torch.uint8)
    split = cifar.Split(pixels, torch.randint(0, 10, (320,), generator=generator))
    some, rest = split.pick(torch.arange(256)), split.pick(torch.arange(256, 320))
    return Lab(some, rest, hidden=16, epochs=2, samples=64)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, measure, and write table and picture beside the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the images")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", default="", help="part of a method's name")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--quick", action="store_true", help="a tiny network, random images")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    if args.data is None and not args.quick:
        parser.error("--data is required, but with --quick.")
    lab = quick() if args.quick else load(args.data, args.split)
    payload = run(lab, args.out, seeds=args.seeds, only=args.only, force=args.force)
    payload = payload or read_json(args.out)
    args.out.with_suffix(".md").write_text(table(payload) + "\n")
    picture(payload, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
