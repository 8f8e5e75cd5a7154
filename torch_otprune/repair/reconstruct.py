"""Train the cut blocks, one after the other, towards what the dense blocks put out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, pi
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.criteria.base import Need
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.blocks import blocks
from torch_otprune.repair.least_squares import LeastSquares
from torch_otprune.repair.lockstep import distance
from torch_otprune.statistics.reduce import first_rank_
from torch_otprune.statistics.sites import real
from torch_otprune.structure.forward import batch_size, evaluating, flat_tensors, map_tensors, run
from torch_otprune.surgery.exchange import gone

__all__ = ["Reconstruct"]

_HELD = 8  # one batch in this many is held out
_SLICE = 64  # samples per step
_HALF = (torch.float16, torch.bfloat16)


@register
class Reconstruct(Repair):
    """Refit by least squares, then take gradient steps on unlabelled data towards the dense blocks.

    Every step runs both models on a few calibration samples and lowers the squared distance of
    all cut blocks' outputs, and of the network's outputs, from the dense ones; each distance is
    relative to the dense signal's power, so that all blocks count alike. Inputs of a block come
    from the cut prefix, so that later blocks correct earlier ones. Batch-norms keep their
    statistics. Blocks in front of removed ones are held to what those put out.

    Limits: can fit the calibration samples too well; a held-out part decides whether the result
    is kept. Weights in half precision swallow such small steps and are left as the refit made them.
    Nothing here sees a label.

    Source: block-wise reconstruction as in Li et al. 2021 (BRECQ), section 3.2; all blocks at
    once, by shares of their power, are ours.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})
    refits: ClassVar[bool] = True

    kind: Literal["reconstruct"] = "reconstruct"
    steps: int = Field(default=400, ge=1, description="gradient steps")
    rate: float = Field(default=5e-4, gt=0, description="Adam's peak step size")
    seconds: float = Field(default=600.0, gt=0, description="no step starts after this long")
    outputs: float = Field(default=1.0, ge=0, description="weight of the network's outputs")
    least_squares: LeastSquares | None = Field(
        default=LeastSquares(), description="the refit to start from; null starts from the cut"
    )

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Refit, then descend; keep the result if held-out samples agree."""
        first = self.least_squares.apply_(patient) if self.least_squares else ()
        if any(p.dtype in _HALF for p in patient.small.parameters()):
            text = "half precision: steps would be lost in rounding"
            return (*first, Note(self.kind, "model", None, None, accepted=False, text=text))
        train, held = _split(patient.batches)
        weights = list(patient.small.parameters())
        start = [w.detach().clone() for w in weights]
        before = distance(patient.dense, patient.small, held)
        steps = _descend(self, patient, train)
        first_rank_(weights)
        after = distance(patient.dense, patient.small, held)
        text = "" if steps == self.steps else f"stopped after {steps} steps, {self.seconds:g} s"
        if after <= before:
            return (*first, Note(self.kind, "model", before, after, accepted=True, text=text))
        with torch.no_grad():
            for weight, old in zip(weights, start, strict=True):
                weight.copy_(old)
        torch.clear_autocast_cache()
        text = f"held-out samples would be {after:.3f} off"
        return (*first, Note(self.kind, "model", before, before, accepted=False, text=text))


def _split(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Hold every eighth batch out; a single batch is halved by samples."""
    if len(batches) == 1:
        batches = _halves(batches[0])
    held = [b for i, b in enumerate(batches) if i % _HELD == _HELD - 1] or [batches[-1]]
    chosen = {id(b) for b in held}
    return [b for b in batches if id(b) not in chosen], held


def _halves(batch: Any) -> list[Any]:
    size = batch_size(batch)
    cut = max(1, size - size // _HELD)
    parts = [slice(0, cut), slice(cut, size)] if cut < size else [slice(0, size)] * 2
    return [_rows(batch, torch.arange(size, device="cpu")[part]) for part in parts]


def _rows(batch: Any, at: Tensor) -> Any:
    size = batch_size(batch)
    return map_tensors(batch, lambda t: t[at.to(t.device)] if t.dim() and len(t) == size else t)


@dataclass
class _Taps:
    """Hooks that keep the outputs of the blocks during one forward pass."""

    model: nn.Module
    paths: Sequence[str]

    def __enter__(self) -> _Taps:
        self.seen: dict[str, list[Tensor]] = {}
        self.handles = [
            self.model.get_submodule(path).register_forward_hook(_Keep(self, path))
            for path in self.paths
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def run(self, batch: Any) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Run the model and hand the blocks' and the network's outputs out."""
        self.seen = {}
        out = flat_tensors(run(self.model, batch))
        return self.seen, [t for t in out if t.is_floating_point()]


class _Keep:
    """The hook of one block."""

    def __init__(self, taps: _Taps, path: str) -> None:
        self.taps, self.path = taps, path

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        tensor = next((t for t in flat_tensors(out) if t.is_floating_point()), None)
        if tensor is not None:
            self.taps.seen.setdefault(self.path, []).append(tensor)


def _descend(setting: Reconstruct, patient: Patient, batches: Sequence[Any]) -> int:
    """Take the steps; return how many there was time for."""
    paths = _counterparts(patient)
    generator = torch.Generator("cpu").manual_seed(patient.seed)
    deadline = time.monotonic() + setting.seconds
    done = 0
    with (
        evaluating(patient.dense),
        evaluating(patient.small),
        torch.enable_grad(),
        _training(patient.small) as live,
        _Taps(patient.dense, sorted(set(paths.values()))) as teacher,
        _Taps(patient.small, tuple(paths)) as pupil,
    ):
        optimiser = torch.optim.Adam(live, lr=setting.rate)
        while done < setting.steps and time.monotonic() < deadline:
            for group in optimiser.param_groups:
                group["lr"] = setting.rate * 0.5 * (1 + cos(pi * done / setting.steps))
            batch = _draw(batches, generator)
            with torch.no_grad():
                seen, ends = teacher.run(batch)
            goal = {path: seen[wanted] for path, wanted in paths.items() if wanted in seen}, ends
            loss = _loss(goal, pupil.run(batch), batch, outputs=setting.outputs)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            torch.clear_autocast_cache()  # the caller's, if any, holds the old weights
            done += 1
            patient.progress("reconstruct", done, setting.steps)
    return done


def _counterparts(patient: Patient) -> dict[str, str]:
    """Map every block whose output is compared to the dense block that it is compared with.

    A cut block is compared with itself. In a row of blocks that lost some, every one that stays
    is compared with the last of the removed ones that follow it.

    Returns:
        paths of the cut model to paths of the dense one.
    """
    found = {p: p for p in blocks(patient.dense, patient.cuts) if not gone(patient.gone, p)}
    removed = {drop.block for drop in patient.drops}
    around = [b for b in patient.graph.blocks if b.name in removed]
    chains = {(b.chain, b.kind, b.level) for b in around if b.kind == "block"}
    front: str | None = None
    for block in patient.graph.blocks:
        if (block.chain, block.kind, block.level) not in chains:
            continue
        if not gone(patient.gone, block.name):
            front = block.name
            found[front] = front
        elif front is not None and block.place > 0:
            found[front] = block.name
    return found


@contextmanager
def _training(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let every floating-point parameter learn; flags and gradients come back afterwards."""
    live = [p for p in model.parameters() if p.is_floating_point()]
    before = [(p, p.requires_grad, p.grad) for p in live]
    try:
        for p in live:
            p.requires_grad_(True)
            p.grad = None
        yield live
    finally:
        for p, flag, gradient in before:
            p.requires_grad_(flag)
            p.grad = gradient


def _draw(batches: Sequence[Any], generator: torch.Generator) -> Any:
    """Draw samples of one batch."""
    batch = batches[int(torch.randint(len(batches), (1,), generator=generator, device="cpu"))]
    order = torch.randperm(batch_size(batch), generator=generator, device="cpu")
    return _rows(batch, order[:_SLICE])


def _loss(
    goal: tuple[dict[str, list[Tensor]], list[Tensor]],
    got: tuple[dict[str, list[Tensor]], list[Tensor]],
    batch: Any,
    *,
    outputs: float,
) -> Tensor:
    """Sum the relative squared distances of all blocks and of the outputs."""
    parts = [
        _relative(*_told(a, b, batch))
        for path, seen in goal[0].items()
        for a, b in zip(seen, got[0][path], strict=True)
        if a.shape == b.shape
    ]
    ends = [_relative(*_told(a, b, batch)) for a, b in zip(goal[1], got[1], strict=True)]
    total: Tensor = torch.stack(ends).mean() * outputs
    return total + torch.stack(parts).mean() if parts else total


def _told(goal: Tensor, got: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Leave out positions that are padding."""
    if goal.dim() < 3 or goal.shape != got.shape:
        return goal, got
    told = real(batch, *goal.shape[:2]).to(goal.device)
    return (goal, got) if bool(told.all()) else (goal[told], got[told])


def _relative(goal: Tensor, got: Tensor) -> Tensor:
    if goal.dtype in _HALF:  # an output cast by the model itself, or autocast
        goal, got = goal.float(), got.float()
    return (got - goal).square().mean() / goal.square().mean().clamp_min(1e-12)
