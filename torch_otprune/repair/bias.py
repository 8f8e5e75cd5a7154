"""Put the mean of what was removed into the consumer's bias."""

from __future__ import annotations

from typing import Literal

import torch

from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.lockstep import Lockstep, Pause, Site
from torch_otprune.statistics.patches import output_rows, pick, positions
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.statistics.sites import real
from torch_otprune.structure.layers import bare

__all__ = ["Bias"]


@register
class Bias(Repair):
    """Shift every consumer so that each of its outputs has the dense network's mean.

    Front to back, as in `least_squares`, but only the intercept is fitted. It goes into the bias,
    or into the running mean of the batch-norm behind. Padding does not count.

    Limits: layers with neither are left alone and noted, and so are parameters that are no layer's;
    nothing is gained where `norm` follows.

    Source: An et al. 2024 (FLAP), section 3.3; sequential inputs are ours.
    """

    kind: Literal["bias"] = "bias"

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Walk both models side by side and shift site by site."""
        hit = {patient.heir(s.path) for c in patient.cuts for s in c.slices if s.side == "in"}
        hit |= patient.behind_lines
        notes: list[Note] = []
        sites = []
        for path in (p for p in patient.graph.order if p in hit):
            if why := patient.unfit(path) or (
                "" if patient.absorbs(path) else "has neither bias nor batch-norm"
            ):
                notes.append(Note(self.kind, path, None, None, accepted=False, text=why))
            else:
                sites.append(patient.site(path))
        loose = sorted({bare(path)[0] for path in hit - set(patient.graph.order)})
        why = "is no layer, and has no bias"
        notes += [Note(self.kind, p, None, None, accepted=False, text=why) for p in loose]
        worker = _Shift(patient, notes)
        if sites:
            with Lockstep(patient.dense, patient.small, patient.batches, sites) as walk:
                walk.play(worker.mend)
        return tuple(notes)


class _Shift:
    """The work at one site after the other."""

    def __init__(self, patient: Patient, notes: list[Note]) -> None:
        self.patient, self.notes = patient, notes

    @torch.no_grad()
    def mend(self, site: Site, pauses: list[tuple[Pause, Pause]]) -> None:
        module = self.patient.small.get_submodule(site.path)
        device = pauses[0][1].inputs.device
        sums = torch.zeros(4, self.patient.width(site.path), dtype=torch.float64, device=device)
        for (dense, small), batch in zip(pauses, self.patient.batches, strict=True):
            total = positions(module, small.inputs)
            at = pick(total, 64, site.path, self.patient.seed)
            told = real(batch, len(small.inputs), total)[:, at].flatten().to(device)
            target = self.patient.target(site, dense, small, at, drift=True)[told]
            off = target - output_rows(module, module.forward(small.inputs), at).double()[told]
            sums += torch.stack(
                [
                    off.sum(0),
                    off.square().sum(0),
                    target.square().sum(0),
                    off.new_full(off.shape[1:], len(off)),
                ]
            )
        all_sum_([sums])
        off, square, power, count = sums
        shift = off / count.clamp_min(1)
        scale = float(power.sum().clamp_min(1e-300))
        before = float(square.sum()) / scale
        after = float((square - count * shift.square()).sum()) / scale
        self.patient.shift_(site.path, shift)
        self.notes.append(Note("bias", site.path, before, after, accepted=True))
