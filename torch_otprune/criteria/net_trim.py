"""Keep the units that a convex program with a norm per unit lets in first; the refit certifies."""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import Criterion, Need, Ranking, register, settle
from torch_otprune.criteria.moments import observed, silent
from torch_otprune.statistics.evidence import Consumer, Evidence
from torch_otprune.statistics.moments import ridge_factor

__all__ = ["NetTrim", "refit_errors"]

_DEEPEST = 1e-3  # smallest penalty, as a share of the one at which no unit is in
_LOOSE = 1e-2  # relative gap from which a ranking says that its program was not solved


@register
class NetTrim(Criterion):
    """Keep the units that come in first as the penalty of a convex program falls.

    All weights that read one unit, of all consumers, share one norm; the squared error of the
    consumers plus the penalty times the sum of these norms is minimised along a path of penalties.
    The price of a set is what least squares leaves on it, which certifies the cut: refitted, no
    consumer is further from its dense answers than the plan says, and the same number bounds their
    W2, since answers are paired.

    Limits: each certificate is about one cut alone; what cuts in front move comes on top. The
    program spends its budget on shrinking, so as a choice of units `obs` is better; it is here for
    its certificate. A consumer's rectifier is not used. Time grows with the square of the
    consumers' inputs, times their outputs, for every round.

    Source: Yuan & Lin 2006 for the norm per group; Net-Trim (Aghasi et al. 2017) with rows as
    groups is ours, solved by Beck & Teboulle 2009 (FISTA).
    """

    kind: Literal["net_trim"] = "net_trim"
    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})
    ridge: float = Field(default=1e-3, gt=0, description="share of the mean second moment")
    penalties: int = Field(default=16, ge=2, description="penalties along the path")
    rounds: int = Field(default=100, ge=1, description="rounds of the solver per penalty, at most")

    def rank(self, evidence: Evidence) -> Ranking:
        """Follow the path; price by what a refit leaves."""
        readers = observed(evidence, "net_trim")
        program = _Program([_Reader(c, self.ridge) for c in readers])
        entered, size, gap = program.path(self.penalties, self.rounds)
        # the earlier the first, then the larger; what never comes in goes first
        score = settle(size / size.max().clamp_min(1e-300)) / 2 - entered
        order = score.argsort(descending=True, stable=True)
        curve = sum(
            (refit_errors(c.felt(), _moments(c), order, self.ridge) for c in readers),
            start=torch.zeros(evidence.units + 1, dtype=torch.float64),
        )
        said = f"the convex program stopped {gap:.1%} from its optimum" if gap > _LOOSE else ""
        return Ranking(order, curve, silent(evidence) or said)

    def certify(self, evidence: Evidence, keep: Int[Tensor, " kept"]) -> str:
        """Bound what every consumer is off by once it is refitted, if nothing else is cut.

        Args:
            evidence: what is known about the group.
            keep: the units that stay.

        Returns:
            one sentence without a full stop.
        """
        gone = torch.ones(evidence.units, dtype=torch.bool)
        gone[keep] = False
        order = torch.cat([keep, gone.nonzero().flatten()])
        told = []
        for c in observed(evidence, "net_trim"):
            left = refit_errors(c.weight, _moments(c), order, self.ridge)[len(keep)]
            told.append(f"'{c.path}' by {sqrt(float(left)):.3g}")
        return f"refitted, this cut alone moves W2 at most: {', '.join(told)}"


def _moments(consumer: Consumer) -> Float[Tensor, "units taps units taps"]:
    assert consumer.second is not None
    return consumer.second


def refit_errors(
    weight: Float[Tensor, "out units taps"],
    second: Float[Tensor, "units taps units taps"],
    order: Int[Tensor, " units"],
    ridge: float,
) -> Float[Tensor, " sizes"]:
    """Price the sets `order[:k]` of every size by what least squares leaves on them.

    With `H = L L'` in the order given, what keeping the first columns leaves is the trailing part
    of `W L`: the Schur complement of the kept block is the trailing block of L times its transpose.

    Args:
        weight: of the consumer.
        second: moments of what it reads.
        order: the units.
        ridge: share of the mean diagonal that the refit adds.

    Returns:
        squared errors of 0 to all units.
    """
    units, taps = weight.shape[1:]
    moments = second[order][:, :, order].reshape(units * taps, units * taps)
    columns = weight[:, order].flatten(1) @ ridge_factor(moments, ridge)
    each = columns.square().sum(0).view(units, taps).sum(1)
    left = each.flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)])


class _Reader:
    """One consumer, its inputs brought to one size per unit."""

    def __init__(self, consumer: Consumer, ridge: float) -> None:
        second = _moments(consumer)
        _, self.units, self.taps = consumer.weight.shape
        power = torch.einsum("iaia->i", second) / self.taps
        self.size = power.clamp_min(0).sqrt()
        floor = self.size.max() * 1e-6
        scale = self.size.clamp_min(float(floor) or 1.0)
        second = second / (scale[:, None, None, None] * scale[:, None])
        self.second = second.reshape(self.units * self.taps, self.units * self.taps).clone()
        self.second.diagonal().add_(ridge)
        self.aim = (consumer.felt() * scale[:, None]).flatten(1)

    def norms(self, value: Tensor) -> Float[Tensor, " units"]:
        """Sum up squares by unit."""
        return value.square().sum(0).view(self.units, self.taps).sum(1)


class _Program:
    """Minimise half the squared errors of all consumers plus a penalty times the units' norms."""

    def __init__(self, readers: list[_Reader]) -> None:
        self.readers = readers
        self.steepest = max(float(torch.linalg.matrix_norm(r.second, 2)) for r in readers)

    def path(self, penalties: int, rounds: int) -> tuple[Tensor, Tensor, float]:
        """Let the penalty fall.

        Args:
            penalties: how many.
            rounds: of the solver for each, at most.

        Returns:
            number of the penalty at which each unit came in, its norm there, and the largest gap
            as a share of the cost without any unit.
        """
        pulls = sum(
            (r.norms(r.aim @ r.second) for r in self.readers), start=torch.zeros(1).double()
        )
        top = float(pulls.max().sqrt())
        entered = torch.full_like(pulls, float(penalties))
        size, worst = torch.zeros_like(pulls), 0.0
        weights = [torch.zeros_like(r.aim) for r in self.readers]
        whole = max(sum(float((r.aim @ r.second * r.aim).sum()) for r in self.readers) / 2, 1e-300)
        for turn in range(penalties):
            penalty = top * _DEEPEST ** ((turn + 1) / penalties)
            weights, gap = self._solve(weights, penalty, rounds, whole=whole)
            worst = max(worst, gap)
            norm = self._norms(weights).sqrt()
            new = (norm > 0) & (entered == penalties)
            entered[new], size[new] = float(turn), norm[new]
        return entered, size, worst

    def _norms(self, weights: list[Tensor]) -> Tensor:
        pairs = zip(self.readers, weights, strict=True)
        return sum((r.norms(w) for r, w in pairs), start=torch.zeros(1).double())

    def _solve(
        self, weights: list[Tensor], penalty: float, rounds: int, *, whole: float
    ) -> tuple[list[Tensor], float]:
        """Take accelerated steps until the gap is small."""
        ahead, speed, gap = weights, 1.0, 1.0
        for turn in range(rounds):
            slopes = [(a - r.aim) @ r.second for r, a in zip(self.readers, ahead, strict=True)]
            moved = [a - s / self.steepest for a, s in zip(ahead, slopes, strict=True)]
            shrink = 1 - penalty / self.steepest / self._norms(moved).sqrt().clamp_min(1e-300)
            new = [
                m * shrink.clamp_min(0).repeat_interleave(r.taps)
                for r, m in zip(self.readers, moved, strict=True)
            ]
            faster = (1 + sqrt(1 + 4 * speed**2)) / 2
            pace = (speed - 1) / faster
            ahead = [n + pace * (n - w) for n, w in zip(new, weights, strict=True)]
            weights, speed = new, faster
            if turn % 10 == 9 or turn == rounds - 1:
                gap = self._gap(weights, penalty) / whole
                if gap < _LOOSE / 10:
                    break
        return weights, gap

    def _gap(self, weights: list[Tensor], penalty: float) -> float:
        """Bound how far the cost is from the least one, by the residual scaled to be feasible."""
        rest = [r.aim - w for r, w in zip(self.readers, weights, strict=True)]
        pulls = [x @ r.second for r, x in zip(self.readers, rest, strict=True)]
        scale = min(1.0, penalty / max(float(self._norms(pulls).max().sqrt()), 1e-300))
        error = sum(float((p * x).sum()) for p, x in zip(pulls, rest, strict=True))
        reach = sum(float((p * r.aim).sum()) for r, p in zip(self.readers, pulls, strict=True))
        cost = error / 2 + penalty * float(self._norms(weights).sqrt().sum())
        return max(cost - (scale * reach - scale**2 * error / 2), 0.0)
