"""Refit every consumer, front to back, to what the dense network would have written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.criteria.base import Need
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.lockstep import Lockstep, Pause, Site
from torch_otprune.repair.loose import refit_loose_
from torch_otprune.repair.one_sided import OneSided, Rows, sums_behind
from torch_otprune.repair.rectified import rectified
from torch_otprune.repair.solve import Fit, Normal, solve
from torch_otprune.statistics.patches import columns, full_weight, pick, positions, rows
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.statistics.sites import real
from torch_otprune.structure.layers import Conv, channels, lies_across, tensor
from torch_otprune.surgery.cut import put_
from torch_otprune.surgery.exchange import gone

__all__ = ["LeastSquares"]

_HELD = 8  # one sample in this many is held out
_KEPT = 1 << 25  # numbers in a layer's rows that are kept while it is refitted


@register
class LeastSquares(Repair):
    """Refit the weights of every layer that lost inputs, on all taps at once.

    Layers are taken in order of execution. A layer's inputs come from the already repaired
    prefix, its targets from the dense network; where its output is added to a stream, the target
    includes what the stream has drifted, so that later blocks correct earlier ones. The ridge
    pulls towards the old weights and is chosen on held-out rows. What a batch's `attention_mask`
    calls padding does not count. Everything is in float64.

    Where a rectifier is all that reads a layer, what it writes below zero is lost anyway. So where
    the dense network is below zero, the target becomes what the fit writes, at most zero, and the
    layer is fitted again, as long as rows held out gain from it.

    Parameters that no layer multiplies with, as an attention's output projection, are fitted first,
    to what the dense network reads and writes there.

    Limits: needs a few rows per column of the layer; layers that run more than once per forward
    pass, transposed and 3-D convolutions are left alone and noted.

    Source: He et al. 2017 (channel pruning), section 3.2, for the refit; sequential inputs as in
    their section 3.3; ridge towards the old weights, chosen by hold-out, and the drift of the
    stream in the target are ours. That zeros of a rectifier need not be matched is from Aghasi et
    al. 2017 (Net-Trim), who solve a convex program; the rounds of least squares are ours.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})
    refits: ClassVar[bool] = True

    kind: Literal["least_squares"] = "least_squares"
    ridge: float | None = Field(
        default=None,
        gt=0,
        description="share of the mean squared column; chosen by hold-out if null",
    )
    rows_per_column: int = Field(default=16, ge=1, description="rows wanted per column of a layer")
    drift: bool = Field(default=True, description="whether targets make up for the stream's drift")
    scope: Literal["consumers", "all"] = Field(
        default="all",
        description="refit every layer from the first that lost inputs, or only those; layers "
        "that only cuts of other rules touch are left to these",
    )
    one_sided: int = Field(
        default=3,
        ge=0,
        description="most rounds that let targets below zero go where a rectifier is all that "
        "reads them; 0 for plain least squares",
    )

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Walk both models side by side and refit site by site."""
        sites, notes = self._sites(patient)
        # first: the layers behind are fitted to what these write
        notes += refit_loose_(patient, kind=self.kind, ridge=self.ridge)
        return (*notes, *self._walk(patient, sites, self.kind))

    def refit_(self, patient: Patient, paths: Sequence[str], *, kind: str) -> tuple[Note, ...]:
        """Refit some layers only.

        Args:
            patient: both models and the data.
            paths: which layers.
            kind: on whose behalf, for the notes.

        Returns:
            one note per layer.
        """
        return self._walk(
            patient, [patient.site(p) for p in patient.graph.order if p in paths], kind
        )

    def _walk(self, patient: Patient, sites: Sequence[Site], kind: str) -> tuple[Note, ...]:
        worker = _Refit(self, patient, len(sites), kind)
        if sites:
            if self.one_sided:
                few = patient.batches[0]
                worker.rectified = rectified(patient.dense, patient.small, sites, few)
            with Lockstep(patient.dense, patient.small, patient.batches, sites) as walk:
                walk.play(worker.mend)
        return tuple(worker.notes)

    def _sites(self, patient: Patient) -> tuple[list[Site], list[Note]]:
        order = [path for path in patient.graph.order if not gone(patient.gone, path)]
        hit = {patient.heir(s.path) for c in patient.cuts for s in c.slices if s.side == "in"}
        hit |= patient.aims.keys() | patient.behind_lines | _behind(patient, order)
        names = {c.group for c in patient.cuts}
        # what only other rules' cuts touch is theirs to repair, or to leave
        others = [c for c in patient.every if c.group not in names]
        foreign = {patient.heir(s.path) for c in others for s in c.slices}
        first = min((order.index(p) for p in hit if p in order), default=len(order))
        wanted = hit | (set(order[first:]) - foreign) if self.scope == "all" else hit
        sites, notes = [], []
        for path in (p for p in order if p in wanted):
            if why := patient.unfit(path):
                notes.append(Note(self.kind, path, None, None, accepted=False, text=why))
            else:
                sites.append(patient.site(path))
        return sites, notes


def _behind(patient: Patient, order: Sequence[str]) -> set[str]:
    """Name the first layer behind every removed block."""
    every = patient.graph.order
    found = set()
    for drop in patient.drops:
        inside = [i for i, path in enumerate(every) if gone([drop], path)]
        if not inside:  # its layers are of a kind that is not listed, such as an attention's own
            found |= set(order[:1])
        found |= set([p for p in every[max(inside, default=len(every)) :] if p in order][:1])
    return found


@dataclass
class _Refit:
    """The work at one site after the other."""

    setting: LeastSquares
    patient: Patient
    total: int
    kind: str
    rectified: frozenset[str] = frozenset()
    notes: list[Note] = field(default_factory=list)
    done: int = 0

    def mend(self, site: Site, pauses: list[tuple[Pause, Pause]]) -> None:
        module = self.patient.small.get_submodule(site.path)
        old, offset = _old(module, self.patient.absorbs(site.path))
        look = self._looked(module, site, pauses, offset)
        fit, held = self._normal(module, site, look)
        floor = _floor(self.patient, site.path, old)
        parts = [
            (
                c,
                o,
                solve(
                    fit.part(c, o),
                    held.part(c, o),
                    old[c][:, o],
                    ridge=self.setting.ridge,
                    floor=None if floor is None else floor[c][:, o],
                ),
            )
            for c, o in _blocks(module, offset)
        ]
        before, after = (_mean(parts, fit, held, name) for name in ("before", "after"))
        worse = _mean(parts, fit, held, "held_after") > _mean(parts, fit, held, "held_before")
        accepted = not worse and after <= before
        text = "the refit does worse on held-out rows"
        if accepted:
            new, text = self._chosen(site.path, look, (fit, held), old=old, parts=parts)
            self._write(module, site.path, new, old, offset=offset)
        self.notes.append(
            Note(self.kind, site.path, before, after if accepted else before, accepted, text)
        )
        self.done += 1
        self.patient.progress("least_squares", self.done, self.total)

    def _chosen(
        self,
        path: str,
        look: Callable[[], Iterable[Rows]],
        sums: tuple[Normal, Normal],
        *,
        old: Tensor,
        parts: list[tuple[Tensor, Tensor, Fit]],
    ) -> tuple[Tensor, str]:
        """Put the groups together; where a rectifier reads them, see what lies behind it."""
        bound = self.patient.floor(path) is not None  # the rounds solve without bounds
        if not bound and next(iter(look())).behind is not None:
            ridges = [(c, o, part.ridge) for c, o, part in parts]
            bent = OneSided(look, *sums, old, ridges).solve(self.setting.one_sided)
            if bent is not None:
                return bent, "fitted behind its rectifier; the errors are plain least squares'"
        new = old.clone()
        for c, o, part in parts:
            new[c[:, None], o] = part.weight
        return new, ""

    def _normal(
        self, module: nn.Module, site: Site, look: Callable[[], Iterable[Rows]]
    ) -> tuple[Normal, Normal]:
        device, out = tensor(module, "weight").device, self.patient.width(site.path)
        sums: list[Normal] = []
        for some in look():
            width = some.design.shape[1]
            sums = sums or [Normal.empty(width, out, device) for _ in range(2)]
            sums[some.held].update(some.design, some.target)
        fit, held = sums
        all_sum_([t for n in (fit, held) for t in (n.gram, n.cross, n.power)])
        return fit, held

    def _looked(
        self, module: nn.Module, site: Site, pauses: list[tuple[Pause, Pause]], offset: bool
    ) -> Callable[[], Iterable[Rows]]:
        """Prepare to go over a site's rows; they are kept where they are few."""
        samples = max(sum(len(small.inputs) for _, small in pauses), 1)  # or none is sent here
        wanted = max(ceil(self.setting.rows_per_column * columns(module) / samples), 16)
        look = partial(self._rows, module, site, pauses, offset, wanted)
        size = samples * min(wanted, positions(module, pauses[0][1].inputs))
        wide = columns(module) + 2 * self.patient.width(site.path)  # the target, and what is behind
        if site.path not in self.rectified or size * wide > _KEPT:
            return look
        kept = list(look())
        return lambda: kept

    def _rows(
        self,
        module: nn.Module,
        site: Site,
        pauses: list[tuple[Pause, Pause]],
        offset: bool,
        wanted: int,
    ) -> Iterator[Rows]:
        """Lay out batch by batch, always the same rows."""
        samples, first = sum(len(small.inputs) for _, small in pauses), 0
        step = min(_HELD, max(samples, 2))
        for (dense, small), batch in zip(pauses, self.patient.batches, strict=True):
            total, size = positions(module, small.inputs), len(small.inputs)
            at = pick(total, wanted, site.path, self.patient.seed + 1)
            design = rows(module, small.inputs, at).double()
            if offset:
                design = torch.cat([design, design.new_ones(len(design), 1)], dim=1)
            target = self.patient.target(site, dense, small, at, drift=self.setting.drift)
            # whole samples are held out: rows of one image resemble each other
            owner = first + torch.arange(len(design), device=design.device) // len(at)
            first += size
            told = real(batch, size, total)[:, at].flatten().to(design.device)
            behind = None
            if site.path in self.rectified:
                behind = sums_behind(self.patient, site, dense, small, at)
            for held in (False, True):
                some = told & ((owner % step == step - 1) == held)
                cut = None if behind is None else (behind[0][some], behind[1])
                yield Rows(design[some], target[some], held, cut)

    def _write(
        self, module: nn.Module, path: str, new: Tensor, old: Tensor, *, offset: bool
    ) -> None:
        if offset:
            self.patient.shift_(path, new[-1] - old[-1])
            new = new[:-1]
        put_(module, "weight", _shaped(module, new.T))


def _old(module: nn.Module, offset: bool) -> tuple[Tensor, bool]:
    """Write the present weight as columns x out, the intercept last."""
    weight = full_weight(module).T
    if not offset:
        return weight, False
    bias = (
        tensor(module, "bias").double()
        if module.bias is not None
        else weight.new_zeros(weight.shape[1])
    )
    return torch.cat([weight, bias[None]]), True


def _floor(patient: Patient, path: str, old: Tensor) -> Tensor | None:
    """Mark what must not become negative; an intercept may."""
    floor = patient.floor(path)
    if floor is None or len(floor) == len(old):
        return floor
    free = torch.zeros(len(old) - len(floor), floor.shape[1], dtype=torch.bool)
    return torch.cat([floor, free.to(floor.device)])


def _blocks(module: nn.Module, offset: bool) -> list[tuple[Tensor, Tensor]]:
    """List the columns and outputs of each group of a grouped convolution."""
    width = columns(module)
    if not isinstance(module, Conv) or module.groups == 1:
        return [
            (
                torch.arange(width + offset, device="cpu"),
                torch.arange(channels(module, "out") or 0, device="cpu"),
            )
        ]
    groups = module.groups
    inputs, outputs = (
        torch.arange(n, device="cpu").chunk(groups) for n in (width, module.out_channels)
    )
    extra = torch.tensor([width] * offset, dtype=torch.int64, device="cpu")
    return [(torch.cat([c, extra]), o) for c, o in zip(inputs, outputs, strict=True)]


def _shaped(module: nn.Module, full: Tensor) -> Tensor:
    """Give a full matrix the shape of the layer's weight."""
    shape = tensor(module, "weight").shape
    if lies_across(module):
        return full.T.reshape(shape)
    if not isinstance(module, Conv) or module.groups == 1:
        return full.reshape(shape)
    each = full.shape[1] // module.groups
    per = full.shape[0] // module.groups
    pieces = [
        full[g * per : (g + 1) * per, g * each : (g + 1) * each] for g in range(module.groups)
    ]
    return torch.cat(pieces).reshape(shape)


def _mean(parts: list[tuple[Tensor, Tensor, Fit]], fit: Normal, held: Normal, name: str) -> float:
    """Average a relative error over the groups of a layer, by the power of their targets."""
    power = (held.power if name.startswith("held") else fit.power + held.power).cpu()
    weights = [float(power[o].sum()) for _, o, _ in parts]
    total = max(sum(weights), 1e-300)
    return (
        sum(w * float(getattr(p, name)) for w, (_, _, p) in zip(weights, parts, strict=True))
        / total
    )
