"""The layer in front is carried onto the law behind the block, from moments alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from torch_otprune.maps.fold import mapped_behind
from torch_otprune.plan.replacement import register
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.lockstep import Lockstep, Pause, Site
from torch_otprune.repair.replace.base import Fitted, Paired, hand_norms_, unmet
from torch_otprune.statistics.patches import output_rows, pick, positions
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.structure.layers import Conv
from torch_otprune.surgery.cut import put_
from torch_otprune.transport import gaussian

__all__ = ["Bures"]

_POSITIONS = 64  # per sample


@register
class Bures(Fitted):
    """Carry what the layer in front writes onto the law of what should be written there.

    The law is taken as Gaussian, so that means and covariances are enough: no pair of samples is
    used. The map is linear and is multiplied into the layer's weight.

    Limits: it restores mean and covariance, not values; where pairs are known, `affine` has the
    smaller error. Only for layers whose bias, or the batch-norm behind them, takes up the mean,
    and not for grouped convolutions.

    Source: Olkin & Pukelsheim 1982 for the map; ours for its use.
    """

    aims: ClassVar[bool] = True
    paired: ClassVar[bool] = False
    kind: Literal["bures"] = "bures"

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Map the layers in front of the gaps."""
        hand_norms_(patient)
        sites = [patient.site(p) for p in patient.graph.order if p in patient.aims]
        worker = _Carry(patient)
        if sites:
            with Lockstep(patient.dense, patient.small, patient.batches, sites) as walk:
                walk.play(worker.mend)
        return (*worker.notes, *unmet(patient, self.kind))


@dataclass
class _Carry:
    """The work at one site after the other."""

    patient: Patient
    notes: list[Note] = field(default_factory=list)

    def mend(self, site: Site, pauses: list[tuple[Pause, Pause]]) -> None:
        module = self.patient.small.get_submodule(site.path)
        if why := self._objection(module, site.path):
            self.notes.append(Note("bures", site.path, None, None, accepted=False, text=why))
            return
        sums = Paired(self.patient.width(site.path))
        for dense, small in pauses:
            assert small.output is not None
            total = positions(module, small.inputs)
            at = pick(total, _POSITIONS, site.path, self.patient.seed)
            wanted = self.patient.target(site, dense, small, at, drift=True)
            sums.add(output_rows(module, small.output, at).double().cpu(), wanted.cpu())
        all_sum_([sums.count, sums.first, sums.product])
        mean_x, mean_y, cov_x, cov_y, _ = sums.moments()
        found = gaussian(mean_x, cov_x, mean_y, cov_y)
        self._write(module, site.path, found.matrix, mean_y - found.matrix @ mean_x)
        scale = float((cov_y.trace() + mean_y.square().sum()).clamp_min(1e-300))
        before = float(found.distance.square()) / scale
        self.notes.append(Note("bures", site.path, before, 0.0, accepted=True))

    def _objection(self, module: nn.Module, path: str) -> str:
        if isinstance(module, Conv) and module.groups > 1:
            return "a grouped convolution cannot mix all its channels"
        return "" if self.patient.absorbs(path) else "nothing takes up the mean"

    def _write(self, module: nn.Module, path: str, matrix: Tensor, shift: Tensor) -> None:
        """Multiply the map into the layer; its constant goes where the layer's own goes."""
        weight, moved = mapped_behind(module, matrix, shift)
        put_(module, "weight", weight)
        self.patient.shift_(path, moved)
