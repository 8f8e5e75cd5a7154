"""What the dense network shows, piece by piece of the data, and how far the cut one is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_otprune.statistics.sites import real
from torch_otprune.structure.forward import batch_size, flat_tensors, map_tensors, run

__all__ = [
    "HALF",
    "Goals",
    "Piece",
    "Shown",
    "Taps",
    "ends",
    "halves",
    "loss",
    "off",
    "pieces",
    "relative",
]

HALF = (torch.float16, torch.bfloat16)


class Shown(NamedTuple):
    """What a network shows of one piece.

    Attributes:
        inner: outputs of the tapped modules, one per call, by path.
        ends: the network's floating-point outputs.
    """

    inner: dict[str, list[Tensor]]
    ends: list[Tensor]

    @property
    def size(self) -> int:
        """Count bytes."""
        tensors = [t for seen in self.inner.values() for t in seen] + self.ends
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Taps:
    """Hooks that keep the outputs of some modules during a forward pass.

    Args:
        model: any module.
        paths: of what to tap.
    """

    model: nn.Module
    paths: Sequence[str]
    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    def __enter__(self) -> Taps:
        self.handles = [
            self.model.get_submodule(path).register_forward_hook(_Keep(self, path))
            for path in self.paths
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def show(self, batch: Any) -> Shown:
        """Run the model on a batch."""
        self.seen = {}
        return Shown(self.seen, ends(self.model, batch))


def ends(model: nn.Module, batch: Any) -> list[Tensor]:
    """Run a model on a batch and list its floating-point outputs."""
    return [t for t in flat_tensors(run(model, batch)) if t.is_floating_point()]


class _Keep:
    """The hook of one module."""

    def __init__(self, taps: Taps, path: str) -> None:
        self.taps, self.path = taps, path

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        tensor = next((t for t in flat_tensors(out) if t.is_floating_point()), None)
        if tensor is not None:
            self.taps.seen.setdefault(self.path, []).append(tensor)


class Piece(NamedTuple):
    """A few samples of one batch.

    Attributes:
        batch: which one.
        rows: which samples of it, each once.
    """

    batch: Any
    rows: Tensor

    def take(self) -> Any:
        """Give the samples in the batch's own form."""
        size = batch_size(self.batch)
        if len(self.rows) == size:
            return self.batch
        return map_tensors(
            self.batch, lambda t: t[self.rows.to(t.device)] if t.dim() and len(t) == size else t
        )


def pieces(batches: Sequence[Any], samples: int, generator: torch.Generator) -> list[Piece]:
    """Cut every batch into random pieces of equal size, within one sample.

    Args:
        batches: calibration batches.
        samples: of a piece, at most.
        generator: of the draw.

    Returns:
        pieces that hold each sample once; batches are not mixed, so that padding stays little.
    """
    found = []
    for batch in batches:
        size = batch_size(batch)
        order = torch.randperm(size, generator=generator, device="cpu")
        found += [Piece(batch, rows) for rows in order.tensor_split(-(-size // samples))]
    return found


def halves(batch: Any, *, last: int) -> list[Any]:
    """Split a batch in two by samples.

    Args:
        batch: any batch.
        last: samples of the second part.

    Returns:
        both parts; twice the batch where it has too few samples.
    """
    size = batch_size(batch)
    rows = torch.arange(size, device="cpu")
    cut = size - last
    parts = [rows[:cut], rows[cut:]] if 0 < cut < size else [rows, rows]
    return [Piece(batch, part).take() for part in parts]


@dataclass
class Goals:
    """What the dense model shows of each piece, computed once while there is room.

    Args:
        taps: of the dense model.
        paths: module of the cut model to the dense one that it is compared with.
        room: bytes to keep at most.
    """

    taps: Taps
    paths: Mapping[str, str]
    room: int
    known: dict[tuple[str, int], Shown] = field(default_factory=dict)

    def of(self, name: tuple[str, int], batch: Any) -> Shown:
        """Look a piece up, or run it.

        Args:
            name: the piece's own.
            batch: its samples.

        Returns:
            the goals, by paths of the cut model.
        """
        if name in self.known:
            return self.known[name]
        with torch.no_grad():
            seen, ends = self.taps.show(batch)
        inner = {own: seen[other] for own, other in self.paths.items() if other in seen}
        shown = Shown(inner, ends)
        if shown.size <= self.room:
            self.room -= shown.size
            self.known[name] = shown
        return shown


def loss(goal: Shown, got: Shown, batch: Any, *, outputs: float) -> Tensor:
    """Add the mean relative squared distance of the modules to that of the outputs.

    Args:
        goal: of the dense model.
        got: of the cut one.
        batch: the samples; positions that it calls padding do not count.
        outputs: weight of the outputs.

    Returns:
        a number without unit, 0 where both agree.
    """
    parts = [
        relative(*_told(a, b, batch))
        for path, seen in goal.inner.items()
        for a, b in zip(seen, got.inner[path], strict=True)
        if a.shape == b.shape
    ]
    last = [relative(*_told(a, b, batch)) for a, b in zip(goal.ends, got.ends, strict=True)]
    total: Tensor = torch.stack(last).mean() * outputs
    return total + torch.stack(parts).mean() if parts else total


def off(goal: Sequence[Tensor], got: Sequence[Tensor], batch: Any) -> Tensor:
    """Sum the squared distance of the outputs and their squared size, without padding.

    Args:
        goal: floating-point outputs of the dense model.
        got: of the cut one.
        batch: the samples.

    Returns:
        both sums, in float64 on the CPU.
    """
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for pair in zip(goal, got, strict=True):
        a, b = (t.double() for t in _told(*pair, batch))
        sums += torch.stack([(a - b).square().sum(), a.square().sum()]).cpu()
    return sums


def relative(goal: Tensor, got: Tensor) -> Tensor:
    """Divide the mean squared distance by the goal's mean square."""
    if goal.dtype in HALF or got.dtype in HALF:  # cast by the model itself, or by autocast
        goal, got = goal.float(), got.float()
    return (got - goal).square().mean() / goal.square().mean().clamp_min(1e-12)


def _told(goal: Tensor, got: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Leave out positions that are padding."""
    if goal.dim() < 3 or goal.shape != got.shape:
        return goal, got
    told = real(batch, *goal.shape[:2]).to(goal.device)
    return (goal, got) if bool(told.all()) else (goal[told], got[told])
