"""Fit a transport map where a layer writes, and multiply it into the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor, nn

from torch_otprune.errors import RepairError
from torch_otprune.maps import AffineFit, TransportMap
from torch_otprune.maps.fold import mapped_behind
from torch_otprune.policy.base import problem
from torch_otprune.policy.registry import Setting
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.lockstep import Lockstep, Pause, Site, distance
from torch_otprune.statistics.patches import output_rows, pick, positions
from torch_otprune.statistics.reduce import all_rows
from torch_otprune.statistics.sites import real
from torch_otprune.structure.layers import Conv
from torch_otprune.surgery.cut import put_
from torch_otprune.surgery.exchange import gone
from torch_otprune.surgery.undo import Snapshot

__all__ = ["Mapping", "foldable", "mapped_sites_"]

_HELD = 8  # one sample in this many is held out
_GUARD = 4  # batches on which maps must not do harm
_FEW = 2  # rows per channel below which a map is not trusted


@dataclass
class Mapping:
    """The work at one site after the other.

    Args:
        patient: both models and the data.
        kind: on whose behalf, for the notes.
        made: the map.
        paired: whether it may know which rows belong together.
        rows: that it is fitted on, at most.
        judged: whether it is kept only if samples that are held out come nearer.
    """

    patient: Patient
    kind: str
    made: TransportMap
    paired: bool
    rows: int
    judged: bool = False
    notes: list[Note] = field(default_factory=list)

    def walk_(self, sites: Sequence[Site]) -> tuple[Note, ...]:
        """Mend sites in order of execution.

        Args:
            sites: layers.

        Returns:
            one note per site.
        """
        patient = self.patient
        if sites:
            with Lockstep(patient.dense, patient.small, patient.batches, sites) as walk:
                walk.play(self.mend)
        return tuple(self.notes)

    @torch.no_grad()
    def mend(self, site: Site, pauses: list[tuple[Pause, Pause]]) -> None:
        """Map what one layer writes onto what it should write."""
        module = self.patient.small.get_submodule(site.path)
        if why := self._objection(module, site.path):
            return self._note(site.path, None, None, why)
        source, target, held = self._rows(module, site, pauses)
        learn = ~held if self.judged else torch.ones_like(held)
        if self.judged and int(learn.sum()) < _FEW * target.shape[1]:
            few = f"{int(learn.sum())} rows are too few for a map of {target.shape[1]} channels"
            return self._note(site.path, None, None, few)
        found = self.made.fit(source[learn], target[learn], self.paired or None)
        if not isinstance(found, AffineFit):
            raise RepairError(
                f"a map of kind {found.kind} with these settings is not affine.",
                where=f"{self.kind}, '{site.path}'",
                fix="choose settings whose map is affine, so that it folds.",
            )
        mapped = found(source)
        before, after = (_error(y, target) for y in (source, mapped))
        if self.judged and not (after < before and self._helps(source, mapped, target, held)):
            return self._note(site.path, before, None, "the map does worse on held-out rows")
        weight, moved = mapped_behind(module, found.matrix, found.shift)
        put_(module, "weight", weight)
        self.patient.shift_(site.path, moved)
        return self._note(site.path, before, after, found.report.line)

    def _helps(self, source: Tensor, mapped: Tensor, target: Tensor, held: Tensor) -> bool:
        seen = held if bool(held.any()) else ~held  # a single sample cannot be held out
        return _error(mapped[seen], target[seen]) <= _error(source[seen], target[seen])

    def _note(self, path: str, before: float | None, after: float | None, text: str) -> None:
        done = after is not None
        self.notes.append(Note(self.kind, path, before, after if done else before, done, text))

    def _objection(self, module: nn.Module, path: str) -> str:
        if isinstance(module, Conv) and module.groups > 1:
            return "a grouped convolution cannot mix all its channels"
        if self.patient.floor(path) is not None:
            return "it must not become negative, and a map mixes signs"
        return "" if self.patient.absorbs(path) else "nothing takes up the mean"

    def _rows(
        self, module: nn.Module, site: Site, pauses: list[tuple[Pause, Pause]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gather what the layer writes, what it should, and which samples are held out."""
        samples = max(sum(len(small.inputs) for _, small in pauses), 1)
        wanted, step, first = max(ceil(self.rows / samples), 1), min(_HELD, max(samples, 2)), 0
        parts = []
        for (dense, small), batch in zip(pauses, self.patient.batches, strict=True):
            total, size = positions(module, small.inputs), len(small.inputs)
            at = pick(total, wanted, site.path, self.patient.seed)
            written = module.forward(small.inputs) if small.output is None else small.output
            source = output_rows(module, written, at).double()
            target = self.patient.target(site, dense, small, at, drift=True)
            owner = first + torch.arange(len(source), device=source.device) // len(at)
            first += size
            held = (owner % step == step - 1).to(source)[:, None]
            told = real(batch, size, total)[:, at].flatten().to(source.device)
            parts.append(torch.cat([source, target.to(source), held], dim=1)[told].cpu())
        every = all_rows(torch.cat(parts))
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        every = every[order[: self.rows].sort().values]
        width = every.shape[1] // 2
        return every[:, :width], every[:, width:-1], every[:, -1] > 0


M = TypeVar("M", bound=Setting)


def foldable(value: M) -> M:
    """Refuse settings of a map that cannot be multiplied into a layer.

    Args:
        value: a transport map.

    Returns:
        the same.
    """
    if not isinstance(value, TransportMap) or value.affine:
        return value
    error = problem(
        f"what {value.kind} fits with these settings bends from point to point, and cannot be "
        "folded.",
        fix="choose the form 'affine' or the solver 'group', or replace='monge_net' for a layer "
        "of its own.",
    )
    raise error


def mapped_sites_(work: Mapping) -> tuple[Note, ...]:
    """Map what every layer writes that lost inputs, or stands in front of a gap.

    Args:
        work: what to fit.

    Returns:
        one note per layer.
    """
    patient, sites = work.patient, []
    hit = {patient.heir(s.path) for c in patient.cuts for s in c.slices if s.side == "in"}
    hit |= patient.behind_lines | patient.aims.keys()
    for path in (p for p in patient.graph.order if p in hit and not gone(patient.gone, p)):
        if why := patient.unfit(path):
            work.notes.append(Note(work.kind, path, None, None, accepted=False, text=why))
        else:
            sites.append(patient.site(path))
    for path in sorted(hit - set(patient.graph.order)):
        text = "is no layer that a map could be multiplied into"
        work.notes.append(Note(work.kind, path, None, None, accepted=False, text=text))
    few = patient.batches[:_GUARD]
    snapshot, far = Snapshot(patient.small), distance(patient.dense, patient.small, few)
    notes = work.walk_(sites)
    if distance(patient.dense, patient.small, few) <= far:
        return notes
    snapshot.restore_()
    text = "the output would end further from the dense one"
    return tuple(n if not n.accepted else replace(n, after=n.before, accepted=False, text=text)
                 for n in notes)  # fmt: skip


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().sum() / wanted.square().sum().clamp_min(1e-300))
