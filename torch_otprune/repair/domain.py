"""Move a network to a shifted domain, without labels and without a step of training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, RepairError
from torch_otprune.maps import AffineFit, DomainMap, TransportMap
from torch_otprune.maps.fold import known_side, mapped_before, mapped_behind
from torch_otprune.policy.base import translated
from torch_otprune.policy.registry import MAPS
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.mapping import foldable
from torch_otprune.statistics.patches import columns, output_rows, pick, positions, rows
from torch_otprune.statistics.reduce import all_rows
from torch_otprune.structure import trace
from torch_otprune.structure.forward import batch_size, evaluating, run_checked
from torch_otprune.structure.layers import Conv
from torch_otprune.surgery.cut import put_
from torch_otprune.surgery.undo import Snapshot

__all__ = ["adapt_"]

_WIDEST = 640  # numbers that one map may move


def adapt_(
    model: nn.Module,
    reference: Sequence[Any],
    shifted: Sequence[Any],
    *,
    map: str | dict[str, Any] | TransportMap = "domain_map",
    side: Literal["out", "in"] = "out",
    paired: bool = False,
    labels: Tensor | None = None,
    rows: int = 16384,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Note, ...]:
    """Fold maps into a network's layers that move a shifted domain back to the home domain.

    Layers are taken in order of execution. At each, the activations on shifted batches, as the
    mended prefix gives them, are mapped onto the law of those that the original network shows on
    home batches; the map is multiplied into the layer. Nothing is paired, and no label of the new
    domain is read.

    Args:
        model: dense or pruned; written in place.
        reference: batches of the domain that it was trained on.
        shifted: batches of the new domain.
        map: an affine map by name, table or instance; `domain_map` matches means and covariances.
        side: `out` maps what a layer writes, channel by channel; `in` maps what it reads, all taps
            of a patch together, which can sharpen what was blurred.
        paired: whether both domains show the same things in the same order; the map is then a
            regression.
        labels: class of every reference sample, where known, in the order of the batches: the
            `domain_map` then couples class by class.
        rows: of each domain that a map is fitted on.
        layers: paths of the layers to mend; None takes all that can be.
        seed: which positions are looked at.

    Returns:
        one note per layer: the squared distance of both laws as Gaussians, before and after, and
        in its text what the map reports.

    Raises:
        CalibrationError: if a domain has no batches, or labels do not fit them.
        PolicyError: for a map that cannot be folded.
        RepairError: if a layer cannot be mended, or none can; the model is as it was then.
    """
    known_side(side, "adapt_")
    chosen = MAPS.resolve(map)
    assert isinstance(chosen, TransportMap)
    with translated("adapt_, argument map"):
        foldable(chosen)
    _fitting(reference, shifted, rows)
    if labels is not None:
        _fitting_labels(labels, reference, chosen)
    home = copy.deepcopy(model)
    patient = Patient(home, model, trace(model, shifted[0]), (), (), shifted)
    paths = _paths(patient, layers, side)
    look = _Look(side, rows, seed)
    wanted = look.rows(home, paths, reference, labels=labels)
    mend, snapshot = _Mend(patient, chosen, side, paired, labels is not None), Snapshot(model)
    try:
        return tuple(mend(p, look.rows(model, [p], shifted)[p], wanted[p]) for p in paths)
    except BaseException:  # handed on, once the model is as it was
        snapshot.restore_()
        raise


def _fitting(reference: Sequence[Any], shifted: Sequence[Any], rows: int) -> None:
    for name, batches in (("reference", reference), ("shifted", shifted)):
        if not len(batches):
            raise CalibrationError(
                f"there are no {name} batches.",
                where=f"adapt_, argument {name}",
                fix="pass some batches of both domains.",
            )
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 4:
        raise CalibrationError(
            f"rows is {rows!r}.",
            where="adapt_, argument rows",
            fix="pass a whole number, several times the width of the widest layer.",
        )


def _fitting_labels(labels: Tensor, reference: Sequence[Any], chosen: TransportMap) -> None:
    samples = sum(map(batch_size, reference))
    whole = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    if not whole or len(labels) != samples:
        raise CalibrationError(
            f"labels name no class for each of the {samples} reference samples.",
            where="adapt_, argument labels",
            fix="pass a tensor of whole numbers, one per sample, in the order of the batches.",
        )
    if not isinstance(chosen, DomainMap):
        raise RepairError(
            f"a map of kind {chosen.kind} uses no labels.",
            where="adapt_, arguments map and labels",
            fix="use the map 'domain_map', or leave the labels out.",
        )


def _paths(patient: Patient, asked: Sequence[str] | None, side: str) -> list[str]:
    """List the layers to mend, in order of execution."""
    why = {path: _objection(patient, path, side) for path in patient.graph.order}
    if asked is not None:
        for path in asked:
            if path not in why or why[path]:
                raise RepairError(
                    f"'{path}' cannot be mended: {why.get(path, 'it is no layer of this model')}.",
                    where="adapt_, argument layers",
                    fix="leave it out.",
                )
    found = [path for path, no in why.items() if not no and (asked is None or path in asked)]
    if not found:
        raise RepairError(
            "no layer can be mended.",
            where=f"adapt_, side {side}, {len(why)} layers",
            fix="use a network of linear layers and convolutions with biases or batch-norms.",
        )
    return found


def _objection(patient: Patient, path: str, side: str) -> str:
    module = patient.small.get_submodule(path)
    if why := patient.unfit(path):
        return why
    if isinstance(module, Conv) and module.groups > 1:
        return "a grouped convolution cannot mix all its channels"
    if not patient.absorbs(path):
        return "nothing takes up the mean"
    width = columns(module) if side == "in" else patient.width(path)
    return f"a map of {width} numbers is too large" if width > _WIDEST else ""


@dataclass
class _Look:
    """Read what layers see or write, at the same positions in both domains."""

    side: str
    wanted: int
    seed: int

    def rows(
        self,
        model: nn.Module,
        paths: Sequence[str],
        batches: Sequence[Any],
        *,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Gather rows of every layer in one walk over the batches; labels become a last column."""
        each = ceil(self.wanted / max(sum(map(batch_size, batches)), 1))
        found: dict[str, list[Tensor]] = {path: [] for path in paths}
        last = len(paths) == 1  # what comes behind it need not run
        hooks = [
            model.get_submodule(p).register_forward_hook(_Taken(self, p, each, found[p], last))
            for p in paths
        ]
        with evaluating(model), torch.no_grad(), _removed(hooks):
            for index, batch in enumerate(batches):
                with suppress(_Seen):
                    run_checked(model, batch, index)
        if labels is not None:
            own = labels.cpu().float()[:, None].split([batch_size(b) for b in batches])
            for parts in found.values():
                parts[:] = map(_labelled, parts, own)
        return {path: all_rows(torch.cat(parts)) for path, parts in found.items()}


def _labelled(part: Tensor, own: Tensor) -> Tensor:
    """Give all positions of a sample its class."""
    return torch.cat([part, own.repeat_interleave(len(part) // len(own), dim=0)], dim=1)


class _Seen(BaseException):
    """Ends a run that has shown what it was for."""


@contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Taken:
    look: _Look
    path: str
    each: int
    found: list[Tensor] = field(default_factory=list)
    last: bool = False

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        at = pick(positions(module, args[0]), self.each, self.path, self.look.seed)
        seen = rows(module, args[0], at) if self.look.side == "in" else output_rows(module, out, at)
        self.found.append(seen.detach().float().cpu())
        if self.last:
            raise _Seen


@dataclass
class _Mend:
    """Fit one layer's map and multiply it in."""

    patient: Patient
    chosen: TransportMap
    side: str
    paired: bool
    labelled: bool = False

    def __call__(self, path: str, source: Tensor, target: Tensor) -> Note:
        module = self.patient.small.get_submodule(path)
        if self.labelled:
            assert isinstance(self.chosen, DomainMap)
            target, own = target[:, :-1], target[:, -1].long()
            found = self.chosen.fit(source, target, self.paired or None, labels=own)
        else:
            found = self.chosen.fit(source, target, self.paired or None)
        if not isinstance(found, AffineFit):
            raise RepairError(
                f"a map of kind {found.kind} with these settings is not affine.",
                where=f"adapt_, argument map, at '{path}'",
                fix="choose settings whose map is affine, so that it folds.",
            )
        weigh = mapped_behind if self.side == "out" else mapped_before
        weight, moved = weigh(module, found.matrix, found.shift)
        put_(module, "weight", weight)
        self.patient.shift_(path, moved)
        before, after = (_laws_apart(points, target) for points in (source, found(source)))
        return Note(self.chosen.kind, path, before, after, accepted=True, text=found.report.line)


def _laws_apart(x: Tensor, y: Tensor) -> float:
    """Compare means and covariances, relative to the size of the target."""
    from torch_otprune.transport import gaussian_points

    return float(gaussian_points(x, y).distance.square() / y.double().square().sum(1).mean())
