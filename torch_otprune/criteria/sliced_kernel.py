"""A diverse subset of channels, by a positive definite kernel between their laws."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import Criterion, Need, Ranking, checked, register, settle
from torch_otprune.criteria.laws import Lines, Together
from torch_otprune.criteria.measures import MEASURES, unheard
from torch_otprune.statistics.evidence import Evidence
from torch_otprune.transport.pivoted import pivoted_cholesky

__all__ = ["SlicedKernel"]

_WORK = 2**34  # products of the Cholesky factor: about ten seconds, and 2600 channels
_SAMPLE = 1024  # units whose distances tell the kernel's width


@register
class SlicedKernel(Criterion):
    """Keep the channels that differ most from each other: a diverse subset.

    Every channel is a law on the line. There W_2 is the distance between quantile functions, so
    `exp(-gamma W_2^2)` is positive definite, and pivoted Cholesky picks, one after the other, the
    channel that those picked before predict worst: greedily the largest determinant. What they
    leave of the kernel's trace is the curve. With `weigh` the kernel is multiplied by the size of
    both channels, so that a faint channel does not stay for being odd.

    A dead channel (one that does not vary) has no law: it goes first, and the note says so.

    Limits: `activations` and `weights` compare marginal laws, and two channels with one histogram
    that fire on different samples look alike to them; `paired` compares channels sample by sample
    instead. In groups of more than 2 600 channels only the first ones are picked by Cholesky (414
    of 100 000), the others follow by what was left of them.

    Source: Kolouri, Zou & Rohde 2016 for the kernel; Harbrecht et al. 2012 for pivoted Cholesky;
    the choice of channels by it is ours.
    """

    kind: Literal["sliced_kernel"] = "sliced_kernel"
    measure: Literal["activations", "weights", "paired"] = Field(
        default="activations",
        description="what makes a law: the values of a channel's signal, or of its filter; "
        "`paired` compares signals sample by sample",
    )
    gamma: float | None = Field(
        default=None, gt=0, description="inverse squared length; null: from the median distance"
    )
    weigh: bool = Field(default=True, description="whether the size of a channel counts as well")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # depends on a setting
        """Say what has to be gathered: the laws of signals need data, those of weights none."""
        return frozenset() if self.measure == "weights" else frozenset({"signals"})

    def rank(self, evidence: Evidence) -> Ranking:
        """Pick channel by channel; a set costs what it leaves of the kernel's trace.

        Args:
            evidence: what is known about the group.

        Returns:
            the ranking, with a note where a fallback decided.
        """
        laws, live, notes = self._laws(evidence)
        checked(laws.sum(1), "unit", where=f"group '{evidence.name}'")
        size = checked(self._size(evidence, live), "unit", where=f"group '{evidence.name}'")
        units, dead = live.nonzero()[:, 0], (~live).nonzero()[:, 0]
        if not len(units):
            order = torch.arange(evidence.units, device="cpu")
            return Ranking(order, laws.new_zeros(len(order) + 1), "; ".join(notes))
        rows, weight = laws[units], size[units] / size[units].max().clamp_min(1e-300)
        scale = weight if self.weigh else torch.ones_like(weight)
        gamma = self.gamma or _width(rows)
        rows = rows - rows.mean(0)  # what all laws share would cancel digits below
        power = rows.square().sum(1)

        def column(pivot: int) -> Tensor:
            far = (power + power[pivot] - 2 * (rows @ rows[pivot])).clamp_min(0)
            far[pivot] = 0
            return scale * scale[pivot] * (-gamma * far).exp()

        most = max(int((_WORK / len(units)) ** 0.5), 1)
        found = pivoted_cholesky(column, scale.square(), steps=most, among_equals=weight)
        if found.rank == most < len(units):
            notes.append(f"{most} channels were picked by Cholesky, the others by what was left")
        order = torch.cat([units[found.order], dead])
        curve = torch.cat([found.trace, found.trace.new_zeros(len(dead))])
        return Ranking(order, settle(curve / curve[0].clamp_min(1e-300)), "; ".join(notes))

    def _laws(self, evidence: Evidence) -> tuple[Tensor, Bool[Tensor, " units"], list[str]]:
        """Embed every channel so that squared distances are W_2^2."""
        heard = [c.signals for c in evidence.consumers if c.signals is not None]
        if self.measure != "weights" and not heard:
            raise unheard(evidence, "sliced_kernel")
        name = "weights" if self.measure == "weights" else "activations"
        seen = MEASURES[name](evidence, 2, "none", 1.0)
        if self.measure == "paired":
            parts = [h.T / h.square().mean().sqrt().clamp_min(1e-300) for h in heard]
        else:
            assert isinstance(seen.laws, Together)
            parts = [law.quantiles for law in seen.laws.parts if isinstance(law, Lines)]
        each = [part / part.shape[1] ** 0.5 for part in parts]
        return torch.cat(each, 1) / len(each) ** 0.5, seen.live, list(seen.notes)

    def _size(self, evidence: Evidence, live: Tensor) -> Float[Tensor, " units"]:
        """Measure what consumers read of each channel, or the weights that write it."""
        total = torch.zeros(evidence.units, dtype=torch.float64, device="cpu")
        for reader in evidence.consumers:
            if reader.signals is not None and self.measure != "weights":
                power = reader.signals.var(0, correction=0)
                if not reader.absorbs:
                    power = reader.signals.square().mean(0)
                total += power * reader.felt().square().sum((0, 2)) / reader.weight.shape[2]
        if not bool(total.any()):
            total = evidence.producers.square().sum(1)
        return total.clamp_min(0).sqrt().where(live, total.new_zeros(()))


def _width(rows: Float[Tensor, "units features"]) -> float:
    """Take one over the median squared distance between channels that differ."""
    some = rows[:: max(len(rows) // _SAMPLE, 1)]
    far = torch.pdist(some).square()
    far = far[far > 0]
    return 1 / float(far.median()) if len(far) else 1.0
