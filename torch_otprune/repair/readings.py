"""What one layer reads and writes while both models walk: sums, and rows where they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.criteria.weights.base import Mode, Samples
from torch_otprune.criteria.weights.refit import damped
from torch_otprune.plan.weights import shape_of
from torch_otprune.repair.base import Patient
from torch_otprune.repair.lockstep import Pause, Site
from torch_otprune.repair.one_sided import sums_behind
from torch_otprune.statistics.patches import columns, output_rows, pick, positions, rows
from torch_otprune.statistics.reduce import all_rows, all_sum_
from torch_otprune.statistics.sites import real
from torch_otprune.structure.layers import tensor
from torch_otprune.surgery.thin import matrices

__all__ = ["Reading", "Sums"]

_PER_COLUMN = 16  # rows wanted for every column in sums
_FEW = 4  # rows wanted for every column where the rows themselves are kept
_HELD = 8  # one sample in this many is held out where a ridge is chosen
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # towards the present weight
_LEAST = 16  # positions of every sample, at least


@dataclass
class Sums:
    """Streaming sums of inputs, with a one behind each, and of what is to be written for them.

    Args:
        gram: products of inputs with inputs.
        cross: products of inputs with outputs.
        power: squares of outputs.
    """

    gram: Float[Tensor, "groups columns columns"]
    cross: Float[Tensor, "groups columns out"]
    power: Float[Tensor, "groups out"]

    @classmethod
    def empty(cls, x: Tensor, y: Tensor) -> Sums:
        """Start with nothing seen, as wide as the first rows."""
        groups, width, out = len(x), x.shape[2], y.shape[2]
        return cls(
            x.new_zeros(groups, width, width),
            x.new_zeros(groups, width, out),
            x.new_zeros(groups, out),
        )

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows."""
        self.gram.baddbmm_(x.mT, x)
        self.cross.baddbmm_(x.mT, y)
        self.power += y.square().sum(1)

    @property
    def count(self) -> int:
        """Count the rows seen."""
        return round(float(self.gram[0, -1, -1]))

    @property
    def mean(self) -> Float[Tensor, "groups columns"]:
        """Average the inputs."""
        return self.gram[:, :-1, -1] / self.count

    def second(self, *, centred: bool) -> Float[Tensor, "groups columns columns"]:
        """Average products of inputs, about the mean if asked."""
        second = self.gram[:, :-1, :-1] / self.count
        return second - self.mean[:, :, None] * self.mean[:, None, :] if centred else second

    def joint(self, *, centred: bool) -> Float[Tensor, "groups out columns"]:
        """Average products of outputs with inputs, about their means if asked."""
        joint = self.cross[:, :-1] / self.count
        if centred:
            joint = joint - self.mean[:, :, None] * self.written[:, None, :]
        return joint.mT

    @property
    def written(self) -> Float[Tensor, "groups out"]:
        """Average the outputs."""
        return self.cross[:, -1] / self.count

    def plus(self, other: Sums) -> Sums:
        """Pool two sets of rows."""
        return Sums(self.gram + other.gram, self.cross + other.cross, self.power + other.power)

    def aim(self, weight: Tensor, *, centred: bool, ridge: float) -> Tensor:
        """Find the dense weight that writes the outputs best, near to a weight.

        Args:
            weight: where the inputs do not tell, this one.
            centred: whether a constant is free.
            ridge: share of the mean squared input that pulls to `weight`.

        Returns:
            groups x out x columns.
        """
        lifted, _ = damped(self.second(centred=centred), ridge)
        missed = self.joint(centred=centred) - weight @ self.second(centred=centred)
        step: Tensor = torch.linalg.solve(lifted, missed.mT)
        return weight + step.mT

    def error(self, weight: Tensor, intercept: Tensor) -> float:
        """Average over rows the squared distance of what a weight writes, all outputs together."""
        u = torch.cat([weight, intercept[:, :, None]], 2).mT
        fitted = (u * (self.gram @ u)).sum() - 2 * (u * self.cross).sum()
        return max(float(self.power.sum() + fitted), 0.0) / self.count


class Reading:
    """One layer at its turn.

    Args:
        patient: both models.
        site: the layer.
        pauses: what every batch shows there.
        mode: whose inputs.
    """

    def __init__(
        self, patient: Patient, site: Site, pauses: Sequence[tuple[Pause, Pause]], mode: Mode
    ) -> None:
        self.patient, self.site, self.pauses, self.mode = patient, site, pauses, mode
        self.module: nn.Module = patient.small.get_submodule(site.path)
        self.offset = patient.absorbs(site.path)
        self.samples = max(sum(len(small.inputs) for _, small in pauses), 1)
        self.weight = matrices(self.module).double()
        bias = getattr(self.module, "bias", None)
        self.bias = self.weight.new_zeros(self.weight.shape[:2])
        if bias is not None:
            self.bias = tensor(self.module, "bias").double().view(self.weight.shape[:2])

    def sums(self) -> tuple[Sums, Sums]:
        """Sum up over all batches and ranks: rows to fit on, and rows of samples held out."""
        found: list[Sums] = []
        for x, y, _, held in self._rows(_PER_COLUMN):
            found = found or [Sums.empty(x, y) for _ in range(2)]
            for sums, part in zip(found, (~held, held), strict=True):
                sums.update(x[:, part], y[:, part])
        all_sum_([t for s in found for t in (s.gram, s.cross, s.power)])
        return found[0], found[1]

    def aim(self, fit: Sums, held: Sums, *, centred: bool) -> Tensor:
        """Find the dense weight that makes up for what is lost in front, if it is one for all data.

        The ridge towards the present weight is chosen on rows held out; where no fit does better
        there, the present weight is the answer.

        Args:
            fit: sums over the rows to fit on.
            held: sums over the others.
            centred: whether a constant is free.

        Returns:
            groups x out x columns.
        """
        best, chosen = self._missed(fit, held, self.weight), 0.0
        for ridge in _RIDGES if fit.count and held.count else ():
            left = self._missed(fit, held, fit.aim(self.weight, centred=centred, ridge=ridge))
            if left < best:
                best, chosen = left, ridge
        if not chosen:
            return self.weight
        return fit.plus(held).aim(self.weight, centred=centred, ridge=chosen)

    def _missed(self, fit: Sums, held: Sums, weight: Tensor) -> float:
        """Measure on rows held out a weight, with the intercept that the others ask for."""
        if not fit.count or not held.count:
            return 0.0
        constant = self.bias
        if self.offset:
            constant = fit.written - (weight @ fit.mean[:, :, None])[:, :, 0]
        return held.error(weight, constant)

    def told(self, *, rectified: bool) -> Samples:
        """Collect the rows themselves, in the unit of what a rectifier sees.

        Args:
            rectified: whether one is all that reads the layer.

        Returns:
            the rows of all ranks.
        """
        parts = list(self._rows(_FEW, rectified=rectified))
        x, y, reached = (torch.cat([part[i] for part in parts], 1) for i in range(3))
        x, y, reached = (_gathered(t) for t in (x, y, reached))
        scale = self._scale() if rectified else torch.ones_like(self.bias)
        own = x[:, :, :-1] @ self.weight.mT + self.bias[:, None, :]
        active = reached > 0 if rectified else torch.ones_like(y, dtype=torch.bool)
        target = y * scale[:, None, :]
        return Samples(
            x=x if self.offset else x[:, :, :-1],
            target=target,
            active=active,
            roof=target - reached,
            own=own * scale[:, None, :],
            scale=scale,
            shifts=self.offset,
        )

    def _scale(self) -> Tensor:
        scale = self.patient.scale(self.site.path)
        assert scale is not None
        return (torch.ones_like(self.bias).flatten() * scale).view(self.bias.shape)

    def _rows(
        self, wanted: int, *, rectified: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Lay out inputs with a one, what to write, and what a rectifier is given, by batch."""
        each = max(ceil(wanted * columns(self.module) / self.samples), _LEAST)
        first, step = 0, min(_HELD, max(self.samples, 2))
        for (dense, small), batch in zip(self.pauses, self.patient.batches, strict=True):
            inputs = dense.inputs if self.mode == "parallel" else small.inputs
            total = positions(self.module, inputs)
            at = pick(total, each, self.site.path, self.patient.seed + 1)
            assert dense.output is not None
            design = rows(self.module, inputs, at).double()
            y = output_rows(self.module, dense.output, at).double()
            reached = y
            if rectified:
                behind = sums_behind(self.patient, self.site, dense, small, at)
                assert behind is not None
                reached = behind[0]
            told = real(batch, len(inputs), total)[:, at].flatten().to(design.device)
            # whole samples are held out: rows of one image resemble each other
            owner = first + torch.arange(len(design), device=design.device) // max(len(at), 1)
            held = (owner % step == step - 1)[told]
            first += len(inputs)
            x = self._laid(design[told])
            yield x, self._apart(y[told]), self._apart(reached[told]), held

    def _laid(self, design: Tensor) -> Tensor:
        """Order columns like the weight's, group by group, and put a one behind them."""
        groups, _, width, taps = shape_of(self.module)
        x = design.reshape(len(design), groups, width, taps).transpose(2, 3).flatten(2)
        x = x.transpose(0, 1)
        return torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)

    def _apart(self, y: Tensor) -> Tensor:
        return y.reshape(len(y), len(self.weight), -1).transpose(0, 1)


def _gathered(value: Tensor) -> Tensor:
    """Put the rows of all ranks together."""
    groups, _, width = value.shape
    every = all_rows(value.transpose(0, 1).flatten(1))
    return every.reshape(len(every), groups, width).transpose(0, 1).to(value.device)
