"""Does the space-fold score foretell what happens when a rectifier becomes linear?

Every rectifier of ResNet-20 alone is replaced by the best line per channel, fitted on calibration
images, and by the identity; the change of the cross-entropy is read on held-out images. Spearman's
rank correlation compares it with what `otp.folds` says of the rectifier, in all its variants.

Expected before measuring: the default (affine residual plus weighted increment) reaches 0.8 for
lines; the switch rate comes near; the raw fold score is below zero, so it ranks backwards.

    python benchmarks/space_folds.py --data DATA
    python benchmarks/space_folds.py --quick --folder /tmp/folds

Writes `space_folds.json`, `.md` and `.png`, and `space_folds_layers.png`, the diagnostic's picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar, cifar10_depth
from benchmarks.common import environment, markdown, measured, write_json
from benchmarks.plot_depth_criteria import spearman
from torch_otprune.report.folds import Folds, LayerFolds, folds

FOLDER = Path(__file__).resolve().parent / "results"
CALIBRATION, HELD_OUT = 256, 1000  # images
VARIANTS: Mapping[str, Callable[[LayerFolds], float]] = {
    "default: residual + weighted increment": lambda x: x.residual + max(x.weighted_increment, 0),
    "residual + increment": lambda x: x.residual + max(x.increment, 0),
    "affine residual": lambda x: x.residual,
    "switch rate": lambda x: x.switch,
    "weighted switch rate": lambda x: x.weighted_switch,
    "switch rate + increment": lambda x: x.switch + max(x.increment, 0),
    "increment": lambda x: max(x.increment, 0),
    "weighted increment": lambda x: max(x.weighted_increment, 0),
    "raw fold score": lambda x: x.score,
    "raw weighted fold score": lambda x: x.weighted_score,
}
DEFAULT = next(iter(VARIANTS))


class Lined(TorchFunctionMode):
    """Put something in the place of one rectifier while the network runs.

    Args:
        number: which call of `relu` in one forward pass, from 0.
        instead: maps its input; None lets it run, for the record.
    """

    def __init__(self, number: int, instead: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.number, self.instead, self.calls = number, instead, 0
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") == "relu":
            self.calls += 1
            if self.calls - 1 == self.number:
                if self.instead is not None:
                    return self.instead(args[0])
                self.seen.append(args[0].clone())
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def line(model: nn.Module, number: int, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit the best slope and intercept per channel to one rectifier."""
    with Lined(number, None) as mode:
        model.eval()(images)
    z = mode.seen[0].transpose(0, 1).flatten(1).double()
    phi = z.clamp_min(0)
    gap = z - z.mean(1, keepdim=True)
    spread = gap.square().sum(1)
    slope = (gap * phi).sum(1) / torch.where(spread > 0, spread, 1.0)
    shift = phi.mean(1) - slope * z.mean(1)
    a, b = (t.float().view(1, -1, 1, 1) for t in (slope, shift))
    return lambda x: a * x + b


@torch.no_grad()
def judged(
    model: nn.Module, split: cifar.Split, number: int, instead: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Return cross-entropy and accuracy with one rectifier replaced; -1 replaces none."""
    found = []
    for images in split.inputs().split(250):
        with Lined(number, instead):
            found.append(model.eval()(images))
    logits = torch.cat(found)
    right = (logits.argmax(1) == split.labels).double().mean()
    return float(F.cross_entropy(logits.double(), split.labels)), 100 * float(right)


def truth(
    model: nn.Module, seen: cifar.Split, held: cifar.Split, names: Sequence[str]
) -> dict[str, Any]:
    """Linearise each rectifier alone and read what that does."""
    loss, accuracy = judged(model, held, -1, F.relu)
    rows, images = [], seen.inputs()
    for number, name in enumerate(names):
        by_line = judged(model, held, number, line(model, number, images))
        as_is = judged(model, held, number, lambda x: x)
        rows.append(
            {
                "name": name,
                "line": round(by_line[0] - loss, 6),
                "identity": round(as_is[0] - loss, 6),
                "line_accuracy": round(by_line[1] - accuracy, 3),
                "identity_accuracy": round(as_is[1] - accuracy, 3),
            }
        )
    return {"loss": round(loss, 6), "accuracy": round(accuracy, 3), "rows": rows}


def correlations(found: Sequence[Folds], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Correlate every variant with both truths, seed by seed."""
    result = {}
    for name, score in VARIANTS.items():
        scores = [[score(layer) for layer in one.layers] for one in found]
        result[name] = {
            truth: [spearman(s, [row[truth] for row in rows]) for s in scores]
            for truth in ("line", "identity")
        }
    return result


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    return f"{sum(known) / len(known):+.2f} ({min(known):+.2f} to {max(known):+.2f})"


def write(folder: Path, payload: dict[str, Any], first: Folds) -> None:
    """Write JSON, tables and pictures."""
    write_json(folder / "space_folds.json", payload)
    found, rows = payload["correlations"], payload["truth"]["rows"]
    ranks = [[n, _mean(c["line"]), _mean(c["identity"])] for n, c in found.items()]
    told = {x.name: x for x in first.layers}
    layers = [
        [r["name"], r["line"], r["identity"], *(f"{v:.3f}" for v in _numbers(told[r["name"]]))]
        for r in rows
    ]
    head = ["rectifier", "loss, line", "loss, identity", "residual", "switch", "score", "increment"]
    text = "\n\n".join(
        [
            f"Rank correlation with the change of the loss, {payload['net']}; mean (least to most) "
            f"over {payload['seeds']} draws of images and paths.",
            markdown(["ranked by", "best line", "identity"], ranks),
            f"Rectifier by rectifier, first draw; dense loss {payload['truth']['loss']}.",
            markdown(head, layers),
        ]
    )
    (folder / "space_folds.md").write_text(text + "\n")
    _picture(folder / "space_folds.png", payload, first)
    first.plot(folder / "space_folds_layers.png")


def _numbers(x: LayerFolds) -> tuple[float, ...]:
    return x.residual, x.switch, x.score, x.increment


def _picture(path: Path, payload: dict[str, Any], first: Folds) -> None:
    from matplotlib.figure import Figure

    rows = payload["truth"]["rows"]
    harm = [max(row["line"], 1e-5) for row in rows]
    shown = (DEFAULT, "switch rate", "raw fold score")
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), shown, strict=True):
        axis.scatter([VARIANTS[name](x) for x in first.layers], harm, c=range(len(harm)))
        axis.set(xlabel=name, yscale="log", ylabel="change of the loss, best line")
        axis.set_title(
            f"rank correlation {_mean(payload['correlations'][name]['line'])}", fontsize=9
        )
        axis.grid(alpha=0.3)
    figure.suptitle(f"{payload['net']}: dark is early, light is late", fontsize=10)
    figure.savefig(path, dpi=120)


def measure(
    net: str, model: nn.Module, train: cifar.Split, *, seeds: int, samples: int, held: int
) -> tuple[dict[str, Any], Folds]:
    """Measure one network."""
    with measured() as took:
        found = []
        for seed in range(seeds):
            seen = cifar.draw(train, seed, samples)[0]
            batch = (seen.inputs(), seen.labels)
            found.append(folds(model, [batch], pairs="inter", seed=seed))
        seen, rest = cifar.draw(train, 0, samples)
        names = [x.name for x in found[0].layers]
        real = truth(model, seen, rest.pick(torch.arange(min(held, len(rest)))), names)
    payload = {
        "question": (__doc__ or "").split("\n\n    ")[0],
        "environment": environment(),
        "net": net,
        "seeds": seeds,
        "calibration": samples,
        "held_out": min(held, len(rest)),
        "correlations": correlations(found, real["rows"]),
        "truth": real,
        "folds": [one.model_dump(mode="json") for one in found],
        "seconds": round(took.seconds, 1),
        "peak_mib": round(took.peak_mib, 1),
    }
    return payload, found[0]


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--quick", action="store_true", help="random data, tiny network, no claim")
    args = parser.parse_args(words)
    if not args.quick and args.data is None:
        parser.error("--data is needed, or --quick.")
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.quick:
        tiny = cifar10_depth.quick_bench()
        payload, first = measure("tiny", tiny.model, tiny.train, seeds=1, samples=64, held=64)
    else:
        train = cifar.load_split(args.data, cifar.NETS["resnet20"].images, "train")
        model = cifar.load_net("resnet20", args.data)
        payload, first = measure(
            "ResNet-20", model, train, seeds=args.seeds, samples=CALIBRATION, held=HELD_OUT
        )
    write(args.folder, payload, first)


if __name__ == "__main__":
    main()
