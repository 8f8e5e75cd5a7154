"""What consumers should read of fused units, from data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.repair.base import Patient
from torch_otprune.repair.moves import Move
from torch_otprune.repair.solve import Normal, solve
from torch_otprune.statistics.patches import full_weight
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.statistics.signals import hear
from torch_otprune.structure.forward import batch_size
from torch_otprune.structure.graph import Member
from torch_otprune.structure.layers import Conv, channels, norm_behind, shared

__all__ = ["Decoded", "Decoder"]

_HELD = 8  # one sample in this many is held out
_ROWS = 16  # per unknown
_FAR = 4.0  # most that a signal is scaled by


@dataclass(frozen=True)
class Decoded:
    """What one consumer reads.

    Args:
        path: the consumer.
        read: what each old unit is read as.
        shift: module and tensor that take up a constant, and the constant; None without one.
    """

    path: str
    read: Float[Tensor, "old new"]
    shift: tuple[tuple[str, str], Tensor] | None = None


@dataclass(frozen=True)
class Decoder:
    """Fits `h = read @ h' + constant` at every consumer of a group that was fused.

    Args:
        patient: both models; the smaller one's producers are fused.
        move: what became of the group.
        full: by least squares; else every signal keeps its coupling and is brought to the
            variance that it had.
        ridge: of least squares, towards the coupling; None chooses by hold-out.
    """

    patient: Patient
    move: Move
    full: bool
    ridge: float | None

    def fitted(self) -> Iterator[Decoded]:
        """Run both models once and fit every consumer that is a layer.

        Yields:
            one per consumer that was heard in both.
        """
        pairs = zip(self.move.old, self.move.new, strict=True)
        readers = {old.path: (old, new) for old, new in pairs if old.side == "in"}
        models = (self.patient.dense, self.patient.small)
        rows = max(_ROWS * len(self.move.into), 2048)
        heard = [
            hear(model, readers, self.patient.batches, rows=rows, seed=self.patient.seed)
            for model in models
        ]
        for path, (old, new) in readers.items():
            dense, small = (found.get(path) for found in heard)
            if dense is not None and small is not None and len(dense) == len(small):
                yield self._fit(path, _units(dense, old), _units(small, new), old)

    def _fit(self, path: str, h: Tensor, new: Tensor, member: Member) -> Decoded:
        place = self._place(path)
        fit, held = self._sums(h, new)
        if not self.full:
            read, constant = self._spread(fit.plus(held))
        else:
            last = new.shape[1] + (place is not None)
            every = torch.arange(last, device="cpu")
            out = torch.arange(h.shape[1], device="cpu")
            prior = torch.cat([self.move.into.T, h.new_zeros(last - new.shape[1], h.shape[1])])
            floor = None
            if self.patient.signs:  # what may only be added stays so
                floor = torch.ones_like(prior, dtype=torch.bool)
                floor[new.shape[1] :] = False
            sums = fit.part(every, out), held.part(every, out)
            found = solve(*sums, prior, ridge=self.ridge, floor=floor)
            read = found.weight[: new.shape[1]].T
            constant = found.weight[-1] if place is not None else h.new_zeros(h.shape[1])
        if place is None:
            return Decoded(path, read)
        key, sign = place
        return Decoded(path, read, (key, sign * self._through(path, constant, member)))

    def _sums(self, h: Tensor, new: Tensor) -> tuple[Normal, Normal]:
        """Sum products over all rows, some samples' apart; a column of ones comes last."""
        design = torch.cat([new, new.new_ones(len(new), 1)], dim=1)
        share = max(len(h) // max(sum(map(batch_size, self.patient.batches)), 1), 1)
        owner = torch.arange(len(h), device="cpu") // share  # rows of a sample resemble each other
        step = min(_HELD, max(int(owner[-1]) + 1, 2))
        away = owner % step == step - 1
        sums = [Normal.empty(design.shape[1], h.shape[1], h.device) for _ in range(2)]
        for part, chosen in zip(sums, (~away, away), strict=True):
            part.update(design[chosen], h[chosen])
        all_sum_([t for part in sums for t in (part.gram, part.cross, part.power)])
        return sums[0], sums[1]

    def _spread(self, sums: Normal) -> tuple[Tensor, Tensor]:
        """Bring what each old unit is read as to the mean and variance it had."""
        count = sums.gram[-1, -1]
        mean, target = sums.gram[-1, :-1] / count, sums.cross[-1] / count
        cov = sums.gram[:-1, :-1] / count - torch.outer(mean, mean)
        into = self.move.into
        var = ((into @ cov) * into).sum(1)
        wanted = (sums.power / count - target.square()).clamp_min(0)
        still = var <= 1e-12 * var.max().clamp_min(1e-300)
        ratio = (wanted / torch.where(still, torch.ones_like(var), var)).sqrt().clamp_max(_FAR)
        read = into * torch.where(still, torch.ones_like(ratio), ratio)[:, None]
        return read, target - read @ mean

    def _place(self, path: str) -> tuple[tuple[str, str], float] | None:
        """Find what takes up a constant: a bias, or the batch-norm behind."""
        patient = self.patient
        module = patient.dense.get_submodule(path)
        if isinstance(module, Conv) and module.transposed:
            return None  # not every output position sees every tap
        if getattr(module, "bias", None) is not None:
            return (path, "bias"), 1.0
        name = norm_behind(patient.small, patient.graph, path, shared(patient.small))
        return None if name is None else ((name, "running_mean"), -1.0)

    def _through(self, path: str, constant: Tensor, member: Member) -> Tensor:
        """Compute what a constant input writes, over all taps."""
        module: nn.Module = self.patient.dense.get_submodule(path)
        full = full_weight(module).cpu()
        inputs = channels(module, "in") or 0
        given = full.new_zeros(inputs)
        given[member.index] = constant[:, None].expand(member.index.shape)
        return full.reshape(len(full), inputs, -1).sum(-1) @ given


def _units(rows: Tensor, member: Member) -> Float[Tensor, "rows units"]:
    """Lay channels out by unit; several channels of a unit are rows of their own."""
    return rows.double()[:, member.index].transpose(1, 2).flatten(0, 1)
