"""Refit layers that run at every step of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.criteria.base import Need
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.lockstep import distance
from torch_otprune.repair.solve import Fit, Normal, solve
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.structure.forward import batch_size, evaluating, run
from torch_otprune.surgery.cut import merged, put_

__all__ = ["Recurrent"]

_HELD = 8  # one sample in this many is held out
_GUARD = 4  # batches on which a refit must not do harm


@register
class Recurrent(Repair):
    """Refit dense layers that lost inputs and run more than once per forward pass.

    One weight serves all steps, so its rows are those of all steps together. First all layers are
    fitted at once to what the dense model writes there, from what it reads itself with the units
    that are left; that is right where these can say everything. Then, layer after layer in order
    of first use, from what the cut model reads as it runs, errors of earlier steps included. What
    moves the output further off is put back. Weights that the policy's `preserve` needs at zero or
    above stay there: the fit is then a non-negative least squares, solved exactly.

    Name it before `reconstruct`, which can train what a fit step by step cannot see: that an
    error of one step is read by the next.

    Limits: dense layers only; PyTorch's own recurrent layers hold their weights themselves and
    are refitted by `least_squares`. Padding counts.

    Source: ours; least squares as in `least_squares`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    kind: Literal["recurrent"] = "recurrent"
    ridge: float | None = Field(
        default=None,
        gt=0,
        description="share of the mean squared column; chosen by hold-out if null",
    )
    sweeps: int = Field(
        default=1,
        ge=0,
        description="how often all layers are gone through as the cut model runs",
    )

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Refit layer after layer."""
        hit = {s.path for c in patient.cuts for s in c.slices if s.side == "in"}
        paths = [p for p in patient.graph.order if p in hit and _fit(patient, p)]
        if not (paths and patient.batches):
            text = "no dense layer that lost inputs runs more than once per forward pass"
            idle = not paths
            return (Note(self.kind, "model", None, None, accepted=False, text=text),) * idle
        notes = {note.site: note for note in self._together_(patient, paths)}
        for sweep in range(self.sweeps):
            for done, path in enumerate(paths):
                found = self._refit_(patient, path)
                notes[path] = _later(notes[path], found)
                patient.progress(self.kind, sweep * len(paths) + done + 1, self.sweeps * len(paths))
        return tuple(notes.values())

    def _together_(self, patient: Patient, paths: Sequence[str]) -> list[Note]:
        """Fit all layers to the dense model's own signals; all are written, or none."""
        olds = {path: _whole(_layer(patient, path)) for path in paths}
        fits = {path: self._fitted(patient, path, olds[path], alone=False) for path in paths}
        far = _far(patient)
        for path, found in fits.items():
            _put_(_layer(patient, path), found.weight)
        accepted = (now := _far(patient)) <= far
        text = "" if accepted else f"together, the error would rise from {far:.2e} to {now:.2e}"
        if not accepted:
            for path, old in olds.items():
                _put_(_layer(patient, path), old)
        return [
            Note(self.kind, path, f.before, f.after if accepted else f.before, accepted, text)
            for path, f in fits.items()
        ]

    def _fitted(self, patient: Patient, path: str, old: Tensor, *, alone: bool) -> Fit:
        fit, held = _sums(patient, path, alone=alone)
        floor = patient.floor(path)
        if floor is not None and len(floor) < len(old):
            floor = torch.cat([floor, torch.zeros_like(floor[:1])])
        return solve(fit, held, old, ridge=self.ridge, floor=floor)

    def _refit_(self, patient: Patient, path: str) -> Note:
        module = _layer(patient, path)
        old = _whole(module)
        found = self._fitted(patient, path, old, alone=True)
        if found.held_after > found.held_before or found.after > found.before:
            text = "the refit does worse on held-out rows"
            return Note(self.kind, path, found.before, found.before, accepted=False, text=text)
        far = _far(patient)
        _put_(module, found.weight)
        if (now := _far(patient)) <= far:
            return Note(self.kind, path, found.before, found.after, accepted=True)
        _put_(module, old)
        text = f"the output's squared error would rise from {far:.2e} to {now:.2e}"
        return Note(self.kind, path, found.before, found.before, accepted=False, text=text)


def _later(first: Note, second: Note) -> Note:
    """Put two sweeps' notes of one layer together."""
    last = second if second.accepted else first
    accepted = first.accepted or second.accepted
    return Note(first.kind, first.site, first.before, last.after, accepted, last.text)


def _fit(patient: Patient, path: str) -> bool:
    """Tell whether a layer is one of these."""
    why = patient.unfit(path)
    dense = isinstance(patient.small.get_submodule(path), nn.Linear)
    return dense and path in patient.graph.repeated and why.startswith("runs more than once")


def _far(patient: Patient) -> float:
    return distance(patient.dense, patient.small, patient.batches[:_GUARD])


def _put_(module: nn.Linear, weight: Tensor) -> None:
    if module.bias is not None:
        put_(module, "bias", weight[-1])
        weight = weight[:-1]
    put_(module, "weight", weight.T)


def _layer(patient: Patient, path: str) -> nn.Linear:
    module = patient.small.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _whole(module: nn.Linear) -> Tensor:
    """Write a weight as columns x out, the bias last."""
    weight = module.weight.detach().double().T
    if module.bias is None:
        return weight
    return torch.cat([weight, module.bias.detach().double()[None]])


def _sums(patient: Patient, path: str, *, alone: bool) -> tuple[Normal, Normal]:
    """Sum products of what is read with what the dense model writes, over all steps.

    Args:
        patient: both models and the data.
        path: the layer.
        alone: whether what is read is the cut model's; else it is the dense one's.

    Returns:
        sums to fit on, and held out.
    """
    small, kept = _layer(patient, path), patient.kept(path)
    width = small.in_features + (small.bias is not None)
    sums = [Normal.empty(width, small.out_features, small.weight.device) for _ in range(2)]
    samples, first = sum(map(batch_size, patient.batches)), 0
    step = min(_HELD, max(samples, 2))
    for batch in patient.batches:
        size = batch_size(batch)
        owner = torch.arange(first, first + size) % step == step - 1
        first += size
        for x, y in _steps(patient, path, batch, alone=alone):
            target = y if kept is None else y[..., kept.to(y.device)]
            ones = x.new_ones(*x.shape[:-1], int(small.bias is not None))
            design = torch.cat([x, ones], -1)
            away = owner if len(x) == size else owner.new_zeros(len(x))
            for part, chosen in zip(sums, (~away, away), strict=True):
                part.update(design[chosen].flatten(0, -2), target[chosen].flatten(0, -2))
    all_sum_([t for part in sums for t in (part.gram, part.cross, part.power)])
    return sums[0], sums[1]


def _steps(
    patient: Patient, path: str, batch: Any, *, alone: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a batch; pair what is read with what the dense model writes."""
    heard = []
    left = None if alone else _left(patient, path)
    for model, place in ((patient.small if alone else patient.dense, 0), (patient.dense, 1)):
        keep = _Keep(place, None if place else left)
        handle = model.get_submodule(path).register_forward_hook(keep)
        try:
            with evaluating(model), torch.no_grad():
                run(model, batch)
        finally:
            handle.remove()
        heard.append(keep.seen)
    yield from _paired(heard)


def _left(patient: Patient, path: str) -> Tensor:
    """List the inputs that a layer kept."""
    (piece,) = (p for p in merged(patient.every) if p.path == path and p.side == "in")
    return torch.tensor(piece.keep, device="cpu")


def _paired(heard: Sequence[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    if len(heard[0]) == len(heard[1]):  # else the models took different ways
        yield from zip(*heard, strict=True)


@dataclass
class _Keep:
    """A hook that keeps the inputs or the outputs of every call."""

    place: int
    left: Tensor | None = None

    def __post_init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        found = (out if self.place else inputs[0]).detach().double()
        self.seen.append(found if self.left is None else found[..., self.left.to(found.device)])
