"""One training of `lacoot.py`, and what is measured on the network that comes out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import count_macs, count_params
from benchmarks.lacoot_nets import BLOCKS, Images, ResNet18
from torch_otprune.training import EntropySchedule, MaxSliced, Memory, Penalty, Pressure

__all__ = ["Bench", "accuracy", "curve", "remove", "train_"]

PUBLISHED = MaxSliced(directions="random", projections=50, relative=False, weight=5.0)


@dataclass
class Bench:
    """Everything an arm needs.

    Args:
        train: images to train on.
        held_out: training images that blocks are ranked with.
        test: images for the final numbers only.
        pool: whether the stem ends with a max-pool.
        width: channels of the first stage.
        epochs: of every training.
        schedule: of the rate, `step` or `cycle`.
        rounds: trainings after the first, for the arms that iterate.
        fraction: of our penalty's gradient beside the task's.
        paired: factor of our penalty's paired term.
        amp: bfloat16 where it pays.
        compiled: run `torch.compile` on the forward pass.
        seed: of everything.
        dense: the plainly trained network, its seconds included, once there is one.
    """

    train: Images
    held_out: Images
    test: Images
    pool: bool
    width: int
    epochs: int
    schedule: str
    rounds: int
    fraction: float
    paired: float
    amp: bool
    compiled: bool
    seed: int
    dense: tuple[nn.Module, float] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Say where the images are."""
        return self.train.labels.device

    @property
    def steps(self) -> int:
        """Count the optimiser steps of one training; the last batch of an epoch is short."""
        return self.epochs * -(-len(self.train) // 128)

    def net(self) -> nn.Module:
        """Build the network, the same for every arm."""
        torch.manual_seed(self.seed)
        model = ResNet18(pool=self.pool, width=self.width).to(self.device)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def penalty(self, arm: str) -> Penalty | None:
        """Say what the loss gets on top."""
        if arm == "lacoot":
            return PUBLISHED
        ours = MaxSliced(fraction=self.fraction, paired=self.paired, total=max(1, self.steps))
        return ours if arm == "ours" else None

    def cast(self) -> AbstractContextManager[Any]:
        """Compute in bfloat16, or not."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()

    def sync(self) -> float:
        """Wait for the device and read the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def train_(
    bench: Bench,
    model: nn.Module,
    *,
    penalty: Penalty | None = None,
    schedule: EntropySchedule | None = None,
    steps: int | None = None,
) -> tuple[float, dict[str, Any]]:
    """Train a network.

    Args:
        bench: data and settings.
        model: trained in place, left in training mode.
        penalty: what is added to the loss.
        schedule: whose zeros stay zeros.
        steps: stop after so many; by default the whole training.

    Returns:
        seconds, and what the penalty had to say at the end.
    """
    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    rate, total = _rates(bench, sgd), bench.steps if steps is None else steps
    pressure = None if penalty is None else Pressure(model, BLOCKS, penalty, seed=bench.seed)
    run: Callable[[Tensor], Tensor] = torch.compile(model) if bench.compiled else model
    order: Sequence[Tensor] = ()
    model.train()
    start = bench.sync()
    with schedule.hold(sgd) if schedule else nullcontext(), pressure or nullcontext():
        for _ in range(total):
            order = order or _shuffled(bench, generator)
            index, order = order[0], order[1:]
            with bench.cast():
                out = run(bench.train.augmented(index, generator))
            loss = F.cross_entropy(out.float(), bench.train.labels[index])
            loss = loss + pressure.penalty() if pressure else loss
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()
            rate.step()
            if pressure:
                pressure.step()
        seconds = bench.sync() - start
        said = {"weight": pressure.weight, "last_values": pressure.values} if pressure else {}
    return seconds, said


def _shuffled(bench: Bench, generator: torch.Generator) -> Sequence[Tensor]:
    order = torch.randperm(len(bench.train), generator=generator, device=bench.device)
    return order.split(128)  # the last batch is short, as in the published loop


def _rates(bench: Bench, sgd: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    if bench.schedule == "cycle":
        total = max(bench.steps, 20) + 1  # timing runs up to 20 steps, however short the training
        return torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.1, total_steps=total)
    marks = [max(1, bench.steps // 2), max(2, 3 * bench.steps // 4)]
    return torch.optim.lr_scheduler.MultiStepLR(sgd, marks, gamma=0.1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Measure top-1 accuracy in evaluation mode, in percent."""
    model.eval()
    right = torch.zeros((), device=images.labels.device)
    for index in torch.arange(len(images), device=images.labels.device).split(500):
        right += (model(images.plain(index)).argmax(1) == images.labels[index]).sum()
    return 100.0 * float(right) / len(images)


def remove(model: nn.Module, path: str) -> nn.Module:
    """Take a block out of a copy of a network. The one place to swap for the library's rule."""
    smaller = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    setattr(smaller.get_submodule(parent), name, nn.Identity())
    return smaller


@torch.no_grad()
def scores(model: nn.Module, images: Images) -> dict[str, dict[str, float]]:
    """Measure how much every block still does, on images without labels.

    Returns:
        by block: `change`, squared change over squared input, and `max_sliced`, the published
        distance, each a mean over batches.
    """
    model.eval()
    seen: dict[str, list[tuple[float, float]]] = {path: [] for path in BLOCKS}
    memories = {path: Memory(0) for path in BLOCKS}
    for index in torch.arange(len(images), device=images.labels.device).split(128):
        x = images.plain(index)
        for name, module in _stages(model):
            y = module(x)
            if name in seen:
                change = (y - x).square().sum() / x.square().sum().clamp(min=1e-30)
                distance = PUBLISHED.value(x, y, memories[name])
                memories[name].commit()
                seen[name].append((float(change), float(distance)))
            x = y
    means = {k: torch.tensor(v, dtype=torch.float64).mean(0).tolist() for k, v in seen.items()}
    return {k: {"change": change, "max_sliced": far} for k, (change, far) in means.items()}


def _stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List stem and blocks in order of execution."""
    stem = [(name, model.get_submodule(name)) for name in ("conv1", "bn1", "relu", "pool")]
    blocks = [
        (f"layer{s}.{b}", model.get_submodule(f"layer{s}.{b}")) for s in range(1, 5) for b in (0, 1)
    ]
    return stem + blocks


@torch.no_grad()
def renorm_(model: nn.Module, images: Images) -> nn.Module:
    """Estimate the batch-norms anew on 1 024 training images, without labels."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
    model.train()
    for index in torch.arange(min(1024, len(images)), device=images.labels.device).split(128):
        model(images.plain(index))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@torch.no_grad()
def latency(bench: Bench, model: nn.Module) -> float:
    """Time a forward pass of 128 images: the median of several, in milliseconds."""
    x = bench.test.plain(torch.arange(min(128, len(bench.test)), device=bench.device))
    times, runs = [], 20 if bench.device.type == "cuda" else 5
    model.eval()
    with bench.cast():
        for _ in range(runs + 2):
            start = bench.sync()
            model(x)
            times.append(1000 * (bench.sync() - start))
    return sorted(times[2:])[runs // 2]


def describe(bench: Bench, model: nn.Module, gone: Sequence[str]) -> dict[str, Any]:
    """Measure one network."""
    example = bench.test.plain(torch.zeros(1, dtype=torch.int64, device=bench.device))
    return {
        "removed": list(gone),
        "held_out": accuracy(model, bench.held_out),
        "test": accuracy(model, bench.test),
        "test_renormed": accuracy(renorm_(copy.deepcopy(model), bench.train), bench.test),
        "macs": count_macs(model, example),
        "params": count_params(model),
        "latency_ms": latency(bench, model),
    }


def curve(bench: Bench, model: nn.Module, criterion: str) -> dict[str, Any]:
    """Rank the blocks on held-out images, then remove one after another."""
    measured = scores(model, bench.held_out)
    order = sorted(BLOCKS, key=lambda path: measured[path][criterion])
    rows = [describe(bench, model, ())]
    for count in range(1, len(order) + 1):
        model = remove(model, order[count - 1])
        rows.append(describe(bench, model, order[:count]))
    return {"criterion": criterion, "scores": measured, "curve": rows}
