"""Refit what no layer multiplies with: parameters of attentions, recurrent layers, own matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.lockstep import distance
from torch_otprune.repair.solve import Fit, Normal, solve
from torch_otprune.statistics.loose import slots, stretches, watch_products
from torch_otprune.statistics.moments import Moments
from torch_otprune.statistics.observation import summed
from torch_otprune.statistics.recorder import Recorder
from torch_otprune.structure.forward import batch_size, evaluating, map_tensors, run
from torch_otprune.structure.layers import axis_of, bare, leaf_of
from torch_otprune.surgery.cut import merged, put_

__all__ = ["refit_loose_"]

_HELD = 8  # one sample in this many is held out
_GUARD = 4  # batches on which the refit must not do harm
_ROWS = 16  # wanted per column


def refit_loose_(patient: Patient, *, kind: str, ridge: float | None) -> list[Note]:
    """Refit the consumers that are no modules to what the dense model writes with them.

    One pass of the dense model tells what they read; a recurrent layer's hidden units are taken
    as the dense model has them. All are refitted, or none if the output ends further off.

    Args:
        patient: both models and the data.
        kind: on whose behalf, for the notes.
        ridge: as `LeastSquares.ridge`.

    Returns:
        one note per parameter that lost inputs.
    """
    modules = {path for path, _ in patient.dense.named_modules()}
    hit = (s.path for c in patient.cuts for s in c.slices if s.side == "in")
    paths = [path for path in dict.fromkeys(hit) if path not in modules]
    if not paths:
        return []
    why = {path: text for path in paths if (text := _unfit(patient, path))}
    some = [path for path in paths if path not in why]
    seen = _seen(patient, some)
    why |= dict.fromkeys((p for p in some if p not in seen), "nobody was seen to multiply with it")
    notes = [Note(kind, bare(p)[0], None, None, accepted=False, text=why[p]) for p in why]
    return [*notes, *_refitted_(patient, seen, kind=kind, ridge=ridge)]


def _unfit(patient: Patient, path: str) -> str:
    """Say why a parameter cannot be refitted; empty where it can."""
    pieces = [piece for cut in patient.every for piece in cut.slices]
    name = bare(path)[0]
    if any(p.side == "expert" and bare(p.path)[0] == name for p in pieces):
        return "its router sends other tokens than it did"
    named = patient.small.named_parameters(remove_duplicate=False)
    if sum(p is leaf_of(patient.small, path) for _, p in named) > 1:
        return "shares a tensor with another layer"
    mask = patient.signs.get(name)
    if mask is not None and bool(mask.any()):
        return "it must not become negative, and would be fitted freely"
    return ""


_Sums = tuple[dict[str, Moments], dict[str, Moments]]
"""Moments of rows to fit on, and of rows to choose the ridge on."""


def _seen(patient: Patient, paths: Sequence[str]) -> dict[str, _Sums]:
    """Run the dense model and note what the parameters are multiplied with."""
    dense, batches = patient.dense, patient.batches
    if not (paths and batches):
        return {}
    counts, samples = slots(dense, paths, batches[0]), sum(map(batch_size, batches))
    sums = []
    for held in (False, True):
        recorder = Recorder(
            dense, (), samples=samples, rows_per_column=_ROWS, seed=patient.seed + 1
        )
        watch_products(dense, counts, recorder)
        try:
            _run(dense, batches, recorder, held=held)
        finally:
            recorder.remove()
        sums.append(summed(dense, recorder, samples)[0])
    fit, held_out = sums
    return {path: (fit, held_out) for path in paths if any(stretches(path, fit))}


@torch.no_grad()
def _run(model: nn.Module, batches: Sequence[Any], recorder: Recorder, *, held: bool) -> None:
    """Run the samples that are held out, or the others."""
    samples, first = sum(map(batch_size, batches)), 0
    step = min(_HELD, max(samples, 2))
    with evaluating(model):
        for batch in batches:
            size = batch_size(batch)
            owner = first + torch.arange(size, device="cpu")
            at = ((owner % step == step - 1) == held).nonzero().flatten()
            first += size
            if len(at):
                recorder.look(len(at), len(at))
                run(model, _taken(batch, at, size))


def _taken(batch: Any, at: Tensor, size: int) -> Any:
    return map_tensors(batch, lambda t: t[at.to(t.device)] if t.dim() and len(t) == size else t)


def _refitted_(
    patient: Patient, seen: dict[str, _Sums], *, kind: str, ridge: float | None
) -> list[Note]:
    """Refit, and take all of it back if the output ends further from the dense one."""
    if not seen:
        return []
    few = patient.batches[:_GUARD]
    old = {path: leaf_of(patient.small, path) for path in seen}
    far = distance(patient.dense, patient.small, few)
    notes = [_mended_(_Case(patient, path), sums, kind, ridge) for path, sums in seen.items()]
    if distance(patient.dense, patient.small, few) <= far:
        return notes
    for path, value in old.items():
        _write_(patient.small, path, value)
    text = "the output would end further from the dense one"
    return [Note(kind, n.site, n.before, n.before, accepted=False, text=text) for n in notes]


def _write_(model: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = bare(path)[0].rpartition(".")
    put_(model.get_submodule(owner), name, value)


@dataclass
class _Case:
    """One parameter in both models, its axis put first and the others laid flat.

    Args:
        patient: both models.
        path: of the axis.
    """

    patient: Patient
    path: str

    def kept(self) -> tuple[Tensor, Tensor]:
        """List the places along the axis, and the outputs of the dense one, that are left."""
        dense = leaf_of(self.patient.dense, self.path)
        axis, name = axis_of(self.path, dense.shape), bare(self.path)[0]
        shape = [n for a, n in enumerate(dense.shape) if a != axis]
        outs = torch.arange(dense.numel() // dense.shape[axis], device="cpu").view(shape)
        inputs = torch.arange(dense.shape[axis], device="cpu")
        for piece in merged(self.patient.every):
            if bare(piece.path)[0] == name:
                keep, where = torch.tensor(piece.keep), axis_of(piece.path, dense.shape)
                if where == axis:
                    inputs = keep
                else:
                    outs = outs.index_select(where - (where > axis), keep)
        return inputs, outs.flatten()

    def flat(self, model: nn.Module) -> Float[Tensor, "inputs outs"]:
        """Read the parameter."""
        value = leaf_of(model, self.path).detach().double().cpu()
        axis = axis_of(self.path, leaf_of(self.patient.dense, self.path).shape)
        return value.movedim(axis, 0).flatten(1)

    def write_(self, new: Float[Tensor, "inputs outs"]) -> None:
        """Replace the parameter in the cut model."""
        old = leaf_of(self.patient.small, self.path)
        axis = axis_of(self.path, leaf_of(self.patient.dense, self.path).shape)
        shape = old.movedim(axis, 0).shape
        _write_(self.patient.small, self.path, new.view(shape).movedim(0, axis).contiguous())


def _mended_(case: _Case, sums: _Sums, kind: str, ridge: float | None) -> Note:
    inputs, outs = case.kept()
    dense, old = case.flat(case.patient.dense), case.flat(case.patient.small)
    new, fits, powers = old.clone(), list[Fit](), list[float]()
    held_out = {number: own for number, _, own in stretches(case.path, sums[1])}
    for number, count, own in stretches(case.path, sums[0]):
        mine = (outs // (dense.shape[1] // count) == number).nonzero().flatten()
        other = held_out.get(number, Moments.empty(len(dense)))
        if len(mine):
            fit, held = (_normal(m, dense[:, outs[mine]], inputs) for m in (own, other))
            fits.append(solve(fit, held, old[:, mine], ridge=ridge))
            powers.append(float(fit.power.sum() + held.power.sum()))
            new[:, mine] = fits[-1].weight
    before, after, held_before, held_after = (
        _mean([getattr(one, name) for one in fits], powers)
        for name in ("before", "after", "held_before", "held_after")
    )
    accepted = held_after <= held_before and after <= before
    if accepted:
        case.write_(new)
    text = "" if accepted else "the refit does worse on held-out rows"
    return Note(kind, bare(case.path)[0], before, after if accepted else before, accepted, text)


def _normal(moments: Moments, weight: Tensor, inputs: Tensor) -> Normal:
    """Write as normal equations that some inputs are to write what all of them wrote."""
    gram = moments.product.double().cpu()
    cross = gram @ weight
    power = (weight * cross).sum(0).clamp_min(0)
    return Normal(gram[inputs][:, inputs], cross[inputs], power)


def _mean(values: Sequence[float], powers: Sequence[float]) -> float:
    total = max(sum(powers), 1e-300)
    return sum(v * p for v, p in zip(values, powers, strict=True)) / total
