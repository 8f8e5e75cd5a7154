"""The layer in front is carried onto what should stand behind the gap, by a fitted map."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.errors import RepairError
from torch_otprune.maps import AffineFit, MapReport, TransportMap
from torch_otprune.maps.fold import mapped_behind
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.lockstep import Lockstep, Pause, Site
from torch_otprune.repair.replace.base import Fitted, hand_norms_
from torch_otprune.statistics.patches import output_rows, pick, positions
from torch_otprune.statistics.reduce import all_rows
from torch_otprune.structure.layers import Conv
from torch_otprune.surgery.cut import put_

__all__ = ["Mapped"]


class Mapped(Fitted):
    """Fit an affine map of what the layer in front writes, and multiply it into the layer.

    Pairs are known, because the same input runs through both networks; `paired=False` forgets
    them and compares laws alone.

    Limits: only for layers whose bias, or the batch-norm behind them, takes up the constant, and
    not for grouped convolutions. Where a rectifier follows the addition, the layer can only add
    where the rectifier is on.
    """

    aims: ClassVar[bool] = True
    paired: bool = Field(default=True, description="whether rows of both networks are matched")
    rows: int = Field(default=4096, ge=8, description="rows that the map is fitted on")

    @abstractmethod
    def transport(self) -> TransportMap:
        """Give the map that is to be fitted."""

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Map the layers in front of the gaps."""
        hand_norms_(patient)
        sites = [patient.site(p) for p in patient.graph.order if p in patient.aims]
        worker = _Carry(patient, self)
        if sites:
            with Lockstep(patient.dense, patient.small, patient.batches, sites) as walk:
                walk.play(worker.mend)
        return tuple(worker.notes)


@dataclass
class _Carry:
    """The work at one site after the other."""

    patient: Patient
    setting: Mapped
    notes: list[Note] = field(default_factory=list)

    def mend(self, site: Site, pauses: list[tuple[Pause, Pause]]) -> None:
        module, kind = self.patient.small.get_submodule(site.path), self.setting.kind
        if why := self._objection(module, site.path):
            self.notes.append(Note(kind, site.path, None, None, accepted=False, text=why))
            return
        source, target = self._rows(module, site, pauses)
        with torch.no_grad():
            found = self.setting.transport().fit(source, target, self.setting.paired or None)
        if not isinstance(found, AffineFit):
            raise RepairError(
                f"a map of kind {found.kind} with these settings is not affine.",
                where=f"replacement {kind}, '{site.path}'",
                fix="choose settings whose map is affine, so that it folds.",
            )
        self._write(module, site.path, found.matrix, found.shift)
        before, after = (_error(y, target) for y in (source, found(source)))
        text = _told(found.report)
        self.notes.append(Note(kind, site.path, before, after, accepted=True, text=text))

    def _objection(self, module: nn.Module, path: str) -> str:
        if isinstance(module, Conv) and module.groups > 1:
            return "a grouped convolution cannot mix all its channels"
        return "" if self.patient.absorbs(path) else "nothing takes up the mean"

    def _rows(
        self, module: nn.Module, site: Site, pauses: list[tuple[Pause, Pause]]
    ) -> tuple[Tensor, Tensor]:
        """Gather what the layer writes, and what it should, at positions spread over all."""
        samples = max(sum(len(small.inputs) for _, small in pauses), 1)
        wanted = max(ceil(self.setting.rows / samples), 1)
        sources, targets = [], []
        for dense, small in pauses:
            assert small.output is not None
            at = pick(positions(module, small.inputs), wanted, site.path, self.patient.seed)
            sources.append(output_rows(module, small.output, at).double().cpu())
            targets.append(self.patient.target(site, dense, small, at, drift=True).cpu())
        both = all_rows(torch.cat([torch.cat(sources), torch.cat(targets)], dim=1))
        order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))
        both = both[order[: self.setting.rows].sort().values]
        width = both.shape[1] // 2
        return both[:, :width], both[:, width:]

    def _write(self, module: nn.Module, path: str, matrix: Tensor, shift: Tensor) -> None:
        """Multiply the map into the layer; its constant goes where the layer's own goes."""
        weight, moved = mapped_behind(module, matrix, shift)
        put_(module, "weight", weight)
        self.patient.shift_(path, moved)


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().sum() / wanted.square().sum().clamp_min(1e-300))


def _told(report: MapReport) -> str:
    """Say in one line what the errors do not."""
    return (
        f"distance of laws {report.fit_before:.3g} -> {report.fit_after:.3g}, by chance "
        f"{report.null:.3g}; Monge gap {report.gap_before:.3g} -> {report.gap_after:.3g}; "
        f"{report.moved} of {report.channels} channels moved"
    )
