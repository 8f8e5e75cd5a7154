"""Fold what folds, in place, after checking that it may."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, PolicyError
from torch_otprune.fold.certificate import Certificate
from torch_otprune.fold.chains import Layer, chains, runs
from torch_otprune.fold.modules import AFFINE
from torch_otprune.fold.pieces import Gate, Piece, cheapest, replacements, standing_apart
from torch_otprune.structure.flow import flow
from torch_otprune.structure.forward import (
    batch_size,
    evaluating,
    first_tensor,
    flat_tensors,
    map_tensors,
    outside_inference,
    run,
    run_checked,
)
from torch_otprune.structure.trace import check
from torch_otprune.surgery.check import tolerance as rounding
from torch_otprune.surgery.oracle import gap

__all__ = ["Fold", "fold_"]


class Fold(BaseModel):
    """One fold that was carried out, or refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    layers: tuple[str, ...] = Field(description="paths of the layers, in order of execution")
    accepted: bool = Field(description="whether one layer now stands for them")
    reason: str = Field(description="why, or why not")
    certificate: Certificate | None = Field(
        default=None, description="what it promises, or would; None where no layer could do it"
    )


@dataclass
class _Draft:
    """A fold that is not written yet.

    Args:
        piece: what folds.
        new: path to new module.
        error: measured change of its output, as a share of the largest output.
        inner: the same away from the border.
    """

    piece: Piece
    new: dict[str, nn.Module]
    error: float = float("inf")
    inner: float = float("inf")

    def record(self, refusal: str | None = None) -> Fold:
        """Say what became of it."""
        certificate = self.piece.certificate.model_copy(update={"error": self.error})
        return Fold(
            layers=tuple(layer.path for layer in self.piece.layers),
            accepted=refusal is None,
            reason=refusal or certificate.reason,
            certificate=certificate,
        )


def fold_(
    model: nn.Module,
    example: Any,
    *,
    gate: Gate = "macs",
    interior: bool = False,
    tolerance: float | None = None,
    around: Collection[str] | None = None,
    shifted: Collection[str] = (),
) -> tuple[Fold, ...]:
    """Fold neighbouring layers in place wherever that is exact and pays.

    Each row of affine layers is cut into the pieces that cost least together. One layer takes the
    place of a piece's first, identities that of the others. Every piece is compared with what it
    replaces on the example before the first write, and the whole model after the last; what moves
    is put back.

    Args:
        model: any module; what is refused stays untouched, and all parameters of what is folded
            are new objects.
        example: one batch, as the model takes it.
        gate: what a fold must not raise: `macs`, `params`, or `none` for the fewest layers.
        interior: also fold where only the border of the output changes.
        tolerance: largest change of an output that counts as rounding, as a share of the largest
            entry; None for the dtype's own.
        around: paths of layers: rows that hold none of them are left alone; None folds all.
        shifted: paths of layers to take for such as map zero to something else, even if their
            present numbers do not.

    Returns:
        one record per fold, carried out or refused, in order of execution; refusals between two
        neighbours name what it would have cost.

    Raises:
        PolicyError: if the gate is unknown.
        CalibrationError: if the model does not run on the example.
        StructureError: if the model cannot be analysed.

    Limits: exact in evaluation mode; batch-norms are frozen at their running statistics, and
    dropouts inside a piece go. An optimiser must be rebuilt.
    """
    if gate not in get_args(Gate):
        raise PolicyError(
            f"gate is {gate!r}.", where="fold_(gate=)", fix="use 'macs', 'params' or 'none'."
        )
    check(model)
    with outside_inference(), torch.no_grad():
        example = map_tensors(example, lambda t: t.clone() if t.is_inference() else t)
        expected = _outputs(model, example)
        found = chains(model, flow(model, example), batch_size(example))
        rows = [tuple(_shifting(x, shifted) for x in chain) for chain in found]
        drafts, records = _planned(rows, gate, interior=interior, around=around)
        limit = rounding(model) if tolerance is None else tolerance
        records += _written_(model, drafts, example, expected=expected, limit=limit)
    order = {x.path: i for i, x in enumerate(x for chain in rows for x in chain)}
    return tuple(sorted(records, key=lambda record: order[record.layers[0]]))


def _shifting(layer: Layer, shifted: Collection[str]) -> Layer:
    if layer.geometry is None or layer.path not in shifted:
        return layer
    return replace(layer, geometry=replace(layer.geometry, shifts=True))


def _planned(
    rows: Sequence[tuple[Layer, ...]],
    gate: Gate,
    *,
    interior: bool,
    around: Collection[str] | None,
) -> tuple[list[_Draft], list[Fold]]:
    """Choose what to fold, and say why the rest stays apart."""
    drafts, refused = [], []
    for chain in rows:
        refused += [
            Fold(layers=(x.path,), accepted=False, reason=x.reason)
            for x in chain
            if x.kind == "stuck" and isinstance(x.module, AFFINE) and len(chain) > 1
            if around is None or x.path in around
        ]
        for row in runs(chain, ()):
            if around is not None and all(x.path not in around for x in row):
                continue
            pieces = cheapest(row, gate, interior=interior)
            drafts += [_Draft(p, replacements(p.layers)) for p in pieces if len(p.layers) > 1]
            for first, second in pairwise(pieces):
                promise, reason = standing_apart(first, second, gate, interior=interior)
                paths = tuple(x.path for x in (*first.layers, *second.layers))
                refused.append(
                    Fold(layers=paths, accepted=False, reason=reason, certificate=promise)
                )
    return drafts, refused


def _written_(
    model: nn.Module,
    drafts: Sequence[_Draft],
    example: Any,
    *,
    expected: Sequence[Tensor],
    limit: float,
) -> list[Fold]:
    """Write every draft that holds on its own, then make sure that the model holds."""
    if not drafts:
        return []
    _measure(model, drafts, example)
    good = [d for d in drafts if d.inner <= limit]
    records = [
        d.record(f"its output moved by {d.inner:.1e} of its largest entry, more than {limit:.1e}")
        for d in drafts
        if d.inner > limit
    ]
    if _tried_(model, good, example, expected=expected, limit=limit) is None:
        return records + [d.record() for d in good]
    for draft in good:  # together they fail: find out which
        refusal = _tried_(model, [draft], example, expected=expected, limit=limit)
        records.append(draft.record(refusal))
    return records


def _tried_(
    model: nn.Module,
    drafts: Sequence[_Draft],
    example: Any,
    *,
    expected: Sequence[Tensor],
    limit: float,
) -> str | None:
    """Write drafts and run the model; put everything back and say why where it no longer holds."""
    old = [(path, model.get_submodule(path)) for draft in drafts for path in draft.new]
    for draft in drafts:
        _put_(model, draft.new.items())
    exact = all(draft.piece.step.kind == "exact" for draft in drafts)
    try:
        moved = gap(expected, _outputs(model, example))
    except CalibrationError as error:  # forward may look for what is gone
        _put_(model, old)
        return f"once folded, {error.problem}"
    if moved <= limit or (moved < float("inf") and not exact):
        return None
    _put_(model, old)
    return f"the model's output moved by {moved:.1e} of its largest entry, more than {limit:.1e}"


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with evaluating(model):  # entered anew each time: modules come and go
        return [t.clone() for t in flat_tensors(run_checked(model, example, 0))]


def _put_(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    for path, module in modules:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, module)


def _measure(model: nn.Module, drafts: Sequence[_Draft], example: Any) -> None:
    """Run the model once, and every draft beside the layers that it would replace."""
    handles = []
    try:
        for draft in drafts:
            first, last = (draft.piece.layers[i].module for i in (0, -1))
            trial = _Trial(draft)
            handles.append(first.register_forward_pre_hook(trial.enter, with_kwargs=True))
            handles.append(last.register_forward_hook(trial.leave))
        with evaluating(model):
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()


class _Trial:
    """The hooks at both ends of a piece."""

    def __init__(self, draft: _Draft) -> None:
        self.draft = draft
        self.got: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute what the new layers make of the input, before anything writes over it."""
        x: Any = first_tensor(args, kwargs)
        for layer in self.draft.piece.layers:
            if new := self.draft.new.get(layer.path):
                x = new(x)
        self.got = x

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """Compare it with what the old ones made."""
        assert self.got is not None
        self.draft.error = gap([out], [self.got])
        if self.got.shape == out.shape:
            border = self.draft.piece.step.border
            self.draft.inner = gap([_inner(out, border)], [_inner(self.got, border)])
        self.got = None


def _inner(x: Tensor, border: tuple[int, ...]) -> Tensor:
    """Leave the border positions out."""
    for axis, width in enumerate(border, start=x.dim() - len(border)):
        x = x.narrow(axis, min(width, x.shape[axis]), max(x.shape[axis] - 2 * width, 0))
    return x
