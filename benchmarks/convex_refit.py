"""Is a convex refit of a pruned network's head better than SGD of the same head in the same time?

ResNet-20 is cut to half its MACs; its pooled features feed one hidden layer of rectified units. It
starts as the network's own linear head, written with two units per class, and both ways to refit
it have the same images, the same loss, the same room of 128 units and the same processor time:
SGD gets what the convex program took, at several numbers of rounds. Penalty and rate are chosen on
validation images; test images are looked at once. Radii come from the transport between each
feature's laws before and after pruning: how far it moves half of the rows; a trial on 300 images
chose that, as at 95 % radii are as wide as the features themselves; it was of seed 0, which is left
out.

Expected before measuring: SGD and the convex refit end within half a point of one another on clean
images, the convex one with fewer units; these radii cost less than half a point and take a few
points back under attack.

    python benchmarks/convex_refit.py --data DATA
    python benchmarks/convex_refit.py --quick --out /tmp/convex.json

Rows are written one by one, and a run goes on where another stopped. Times are processor seconds of
one thread, not of the clock.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar
from benchmarks.common import Panel, environment, markdown, read_json, save_picture, write_json

OUT = Path(__file__).resolve().parent / "results" / "convex_refit.json"
WIDTH, LEVEL, EPSILON, PGD = 128, 0.5, 1 / 255, 5
PENALTIES, RATES = (1e-3, 1e-2, 1e-1), (0.003, 0.03, 0.3)
SIZES, ROUNDS = (1000, 1000, 1000, 200), (20, 60, 300)
QUICK_SIZES, QUICK_ROUNDS = (80, 40, 40, 16), (5,)


@dataclass(frozen=True)
class Part:
    """Features of one part of the images.

    Args:
        small: of the pruned network.
        dense: of the dense one.
        labels: class numbers.
        answers: logits of the dense network.
    """

    small: Tensor
    dense: Tensor
    labels: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Bench:
    """A pruned network and its images."""

    small: cifar.ResNet
    dense: cifar.ResNet
    train: Part
    held: Part
    test: Part
    attacked: cifar.Split

    @property
    def radii(self) -> Tensor:
        """Measure how far transport moves each feature's law, at a quantile of the rows."""
        laws = self.train.small.sort(dim=0).values, self.train.dense.sort(dim=0).values
        return (laws[0] - laws[1]).abs().quantile(LEVEL, dim=0)


@torch.no_grad()
def features(model: cifar.ResNet, split: cifar.Split) -> Tensor:
    """Give what the linear head reads."""
    trunk = copy.deepcopy(model)
    trunk.linear = nn.Identity()  # type: ignore[assignment]
    return torch.cat([trunk(batch) for batch in cifar.batches(split.inputs())])


def part(small: cifar.ResNet, dense: cifar.ResNet, split: cifar.Split) -> Part:
    """Run both networks on a part of the images."""
    seen = features(dense, split)
    return Part(features(small, split), seen, split.labels, dense.linear(seen).detach())


def prepare(data: Path | None, seed: int, sizes: tuple[int, int, int, int]) -> Bench:
    """Cut the network and run it on all images."""
    import torch_otprune as otp

    n, held, test, attacked = sizes
    if data is None:
        torch.manual_seed(seed)
        dense = cifar.ResNet(blocks=1, width=8).eval()
        pixels = torch.randint(0, 256, (n + held + test, 3, 16, 16), dtype=torch.uint8)
        every = cifar.Split(pixels, torch.randint(0, 10, (len(pixels),)))
        train, other, last = (every.pick(at) for at in torch.arange(len(every)).split(sizes[:3]))
    else:
        dense = cifar.load_net("resnet20", data)
        train, other = cifar.draw(cifar.load_split(data, "original", "train"), seed, n)
        last = cifar.load_split(data, "original", "test")
        other, last = (
            s.pick(torch.arange(min(m, len(s)))) for s, m in ((other, held), (last, test))
        )
    small = copy.deepcopy(dense)
    rule = otp.Channels(targets=["layer*"], criterion="transport", repair="least_squares")
    shown = cifar.batches(train.pick(torch.arange(min(256, n))).inputs(), 64)
    budget = otp.Budget(macs="50%" if data else "80%")
    otp.prune_(small, otp.Policy(rules=[rule], budget=budget), shown)
    parts = [part(small, dense, split) for split in (train, other, last)]
    return Bench(small, dense, *parts, last.pick(torch.arange(min(attacked, len(last)))))


def doubled(head: nn.Linear) -> nn.Sequential:
    """Write a linear head with two rectified units per class, exactly."""
    classes = head.out_features
    hidden, out = (
        nn.Linear(head.in_features, 2 * classes),
        nn.Linear(2 * classes, classes, bias=False),
    )
    eye = torch.eye(classes)
    with torch.no_grad():
        hidden.weight.copy_(torch.cat([head.weight, -head.weight]))
        hidden.bias.copy_(torch.cat([head.bias, -head.bias]))
        out.weight.copy_(torch.cat([eye, -eye], 1))
    return nn.Sequential(hidden, nn.ReLU(), out)


def roomy(head: nn.Linear, seed: int) -> nn.Sequential:
    """Give the same head room for more units, which write nothing yet."""
    torch.manual_seed(seed)
    made, own = (
        nn.Sequential(
            nn.Linear(head.in_features, WIDTH), nn.ReLU(), nn.Linear(WIDTH, head.out_features)
        ),
        doubled(head),
    )
    with torch.no_grad():
        count = own[0].out_features
        made[0].weight[:count], made[0].bias[:count] = own[0].weight, own[0].bias
        made[2].weight.zero_()
        made[2].bias.zero_()
        made[2].weight[:, :count] = own[2].weight
    return made


def sgd(
    bench: Bench, seed: int, kind: tuple[str, bool], *, rate: float, decay: float, seconds: float
) -> nn.Sequential:
    """Train by SGD with momentum for so much processor time; the rate falls along a cosine.

    Against moves of the features, every step moves them by the sign of the slope, all the way.
    """
    from torch_otprune.repair.convex import LOSSES

    net, x, (loss, robust) = roomy(bench.small.linear, seed), bench.train.small, kind
    goal = _goal(bench, loss)
    rule = LOSSES[loss]  # type: ignore[index]
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    generator, start = torch.Generator().manual_seed(seed), time.process_time()
    while (share := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))
        at = torch.randint(len(x), (128,), generator=generator)
        seen = x[at]
        if robust:
            seen = seen.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(rule.each(net(seen), goal[at]).sum(), seen)
            seen = seen.detach() + bench.radii * slope.sign()
        optimizer.zero_grad()
        rule.each(net(seen), goal[at]).mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
    return net.eval()


def _goal(bench: Bench, loss: str) -> Tensor:
    """Give the dense network's answers, or labels as zeros and ones."""
    if loss == "squared":
        return bench.train.answers
    return F.one_hot(bench.train.labels, bench.train.answers.shape[1]).float()


def convex(
    bench: Bench, kind: tuple[str, bool], penalty: float, rounds: int
) -> tuple[nn.Sequential, dict[str, Any]]:
    """Refit by the convex program."""
    from torch_otprune.repair.convex import ConvexHead

    start, x, (loss, robust) = doubled(bench.small.linear), bench.train.small, kind
    target = bench.train.answers if loss == "squared" else bench.train.labels
    made = ConvexHead(loss=loss, penalty=penalty, rounds=rounds, steps=rounds).fit(  # type: ignore[arg-type]
        x, target, start=(start[0], start[2]), width=WIDTH, radii=bench.radii if robust else None
    )
    told = {"before": made.before, "objective": made.objective, "gap": made.gap}
    told |= {"units": made.units, "stable": made.stable, "patterns": made.patterns}
    return made.to_module(), told | {"absolute_penalty": made.penalty}


def right(head: nn.Module, part: Part) -> float:
    """Measure accuracy on features, in percent."""
    with torch.no_grad():
        return 100 * float((head(part.small).argmax(1) == part.labels).double().mean())


def pushed(head: nn.Module, part: Part, radii: Tensor, steps: int) -> float:
    """Measure accuracy under projected gradient steps on features within the radii."""
    move = _attack(head, part.small, part.labels, radii, steps)
    with torch.no_grad():
        return 100 * float((head(part.small + move).argmax(1) == part.labels).double().mean())


def _attack(model: nn.Module, x: Tensor, y: Tensor, radii: Tensor, steps: int) -> Tensor:
    """Climb the loss; one step goes all the way, several take a share each."""
    move = torch.zeros_like(x)
    for _ in range(steps):
        move = move.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x + move), y), move)
        by = radii if steps == 1 else 2.5 * radii / steps
        move = (move + by * slope.sign()).detach()
        move = torch.minimum(torch.maximum(move, -radii), radii)
    return move


def attacked(bench: Bench, head: nn.Module, steps: int) -> float:
    """Measure accuracy under moves of the pixels by at most 1/255; 0 steps leave them."""
    model = copy.deepcopy(bench.small)
    model.linear = head  # type: ignore[assignment]
    x, y = bench.attacked.inputs(), bench.attacked.labels
    radii = (EPSILON / torch.tensor(cifar.STD)).view(3, 1, 1)
    moved = x + _attack(model, x, y, radii, steps) if steps else x
    with torch.no_grad():
        return 100 * float((model(moved).argmax(1) == y).double().mean())


KINDS = {
    "logistic": ("logistic", False),
    "hinge": ("hinge", False),
    "squared, no labels": ("squared", False),
    "logistic, robust": ("logistic", True),
}
Row = dict[str, Any]


def rows(bench: Bench, seed: int, rounds: Sequence[int], known: Sequence[Row]) -> Iterator[Row]:
    """Measure what is not known yet; settings are chosen on validation features."""
    done = {(row["method"], row["rounds"]): row for row in known if row["seed"] == seed}
    if ("as pruned", 0) not in done:
        told = {"cpu_seconds": 0.0, "units": None, "rounds": 0}
        yield _row(bench, seed, "as pruned", bench.small.linear, told)
    for count in rounds:
        for name, kind in KINDS.items():
            first, second = f"convex, {name}", f"SGD, {name}"
            if (first, count) not in done:
                made = partial(convex, bench, kind, rounds=count)
                found = _best(bench, [_timed(partial(made, p)) | {"setting": p} for p in PENALTIES])
                row = _row(bench, seed, first, found.pop("head"), found | {"rounds": count})
                done[first, count] = row
                yield row
            if (second, count) not in done:
                made = partial(_sgd, bench, seed, kind, done[first, count])
                found = _best(bench, [_timed(partial(made, r)) | {"setting": r} for r in RATES])
                yield _row(bench, seed, second, found.pop("head"), found | {"rounds": count})


def _sgd(
    bench: Bench, seed: int, kind: tuple[str, bool], twin: Row, rate: float
) -> tuple[nn.Module, Row]:
    decay, seconds = twin["absolute_penalty"], max(twin["cpu_seconds"], 0.01)
    return sgd(bench, seed, kind, rate=rate, decay=decay, seconds=seconds), {"units": WIDTH}


def _timed(work: Callable[[], tuple[nn.Module, Row]]) -> Row:
    start = time.process_time()
    head, told = work()
    return told | {"head": head, "cpu_seconds": round(time.process_time() - start, 3)}


def _best(bench: Bench, tries: Sequence[Row]) -> Row:
    return max(tries, key=lambda made: right(made["head"], bench.held))


def _row(bench: Bench, seed: int, method: str, head: nn.Module, told: Row) -> Row:
    row = {"method": method, "seed": seed, **told}
    row |= {"train": right(head, bench.train), "validation": right(head, bench.held)}
    row |= {"test": right(head, bench.test), "test_images": len(bench.test.labels)}
    row |= {f"features_{n}": pushed(head, bench.test, bench.radii, n) for n in (1, PGD)}
    row |= {f"pixels_{n}": attacked(bench, head, n) for n in (0, 1, PGD)}
    return row | {"attacked_images": len(bench.attacked), "train_images": len(bench.train.labels)}


COLUMNS = (
    "train",
    "validation",
    "test",
    "features_1",
    f"features_{PGD}",
    "pixels_0",
    "pixels_1",
    f"pixels_{PGD}",
)
HEADS = ("method", "rounds", "seeds", "units", "CPU s", "gap / objective", "train",
         "validation", "test", "features, FGSM", "features, PGD", "subset, clean", "pixels, FGSM",
         "pixels, PGD")  # fmt: skip


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Write one line per method and number of rounds, means and standard deviations over seeds."""
    lines = []
    for method, rounds in dict.fromkeys((row["method"], row["rounds"]) for row in found):
        own = [row for row in found if (row["method"], row["rounds"]) == (method, rounds)]
        gaps = [r["gap"] / r["objective"] for r in own if r.get("gap") is not None]
        units = [r["units"] for r in own if r["units"] is not None]
        first = [method, str(rounds or "none"), str(len(own))]
        first += [f"{statistics.mean(units):.0f}" if units else "linear"]
        first += [f"{statistics.mean(r['cpu_seconds'] for r in own):.2g}"]
        first += [f"{100 * statistics.mean(gaps):.1f} %" if gaps else "none"]
        lines.append([*first, *(spread([r[c] for r in own]) for c in COLUMNS)])
    return markdown(HEADS, lines)


def spread(values: Sequence[float]) -> str:
    """Write a mean and a standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def picture(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw clean accuracy by processor seconds, and accuracy under attack at the most rounds."""
    names = list(dict.fromkeys(row["method"] for row in found))
    most = max(row["rounds"] for row in found)
    timed = {name: _course([r for r in found if r["method"] == name]) for name in names[1:]}
    level = statistics.mean(row["test"] for row in found if row["method"] == names[0])
    save_picture(
        path, [Panel("clean test images", timed, level, "as pruned")],
        x="processor seconds, one thread", y="accuracy, %",
    )  # fmt: skip
    panels = []
    for title, columns in (
        ("features moved as far as their laws moved", ("test", "features_1", f"features_{PGD}")),
        ("pixels moved by 1/255", ("pixels_0", "pixels_1", f"pixels_{PGD}")),
    ):
        series = {}
        for name in names:
            own = [r for r in found if r["method"] == name and r["rounds"] in (0, most)]
            if own:
                values = [[row[column] for row in own] for column in columns]
                series[name] = [(float(at), *_mean(v)) for at, v in enumerate(values)]
        panels.append(Panel(title, series))
    other = path.with_stem(f"{path.stem}_attacks")
    save_picture(other, panels, x="0: clean, 1: FGSM, 2: PGD", y="accuracy, %")


def _course(own: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    points = []
    for rounds in dict.fromkeys(row["rounds"] for row in own):
        same = [row for row in own if row["rounds"] == rounds]
        seconds = statistics.mean(row["cpu_seconds"] for row in same)
        points.append((seconds, *_mean([row["test"] for row in same])))
    return points


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, measure, and write JSON, table and picture after every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images and weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="random data, tiny network, no claim")
    args = parser.parse_args(words)
    if not args.quick and args.data is None:
        parser.error("--data is needed, or --quick.")
    torch.set_num_threads(1)
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if args.quick else (SIZES, ROUNDS)
    settings = {"sizes": list(sizes), "rounds": list(rounds), "units": WIDTH}
    settings |= {"penalties": list(PENALTIES), "rates": list(RATES), "radii_quantile": LEVEL}
    found = _before(args.out, settings)
    wanted = 1 + 2 * len(KINDS) * len(rounds)
    for seed in args.seeds[:1] if args.quick else args.seeds:
        if sum(row["seed"] == seed for row in found) == wanted:
            continue
        bench = prepare(None if args.quick else args.data, seed, sizes)
        for row in rows(bench, seed, rounds, tuple(found)):
            found.append(row)
            write_json(args.out, {"question": (__doc__ or "").split("\n\n    ")[0],
                                  "settings": settings, "environment": environment(),
                                  "rows": found})  # fmt: skip
        args.out.with_suffix(".md").write_text(table(found) + "\n")
        picture(found, args.out.with_suffix(".png"))


def _before(out: Path, settings: Row) -> list[Row]:
    """Take up rows of a run that stopped, if it had the same settings."""
    if not out.exists():
        return []
    earlier = read_json(out)
    return list(earlier["rows"]) if earlier.get("settings") == settings else []


if __name__ == "__main__":
    main()
