"""Redundancy by optimal transport: how far a channel is from the barycenter of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from torch_otprune.criteria.base import Criterion, Need, Ranking, checked, register, settle
from torch_otprune.criteria.laws import Laws
from torch_otprune.criteria.measures import MEASURES, Seen
from torch_otprune.errors import PolicyError
from torch_otprune.statistics.evidence import Evidence

__all__ = ["CPOT"]

_FEW = 3  # of so few laws none is more central than another in a way that means anything
_ROUNDS = 20  # of Lloyd's iteration


@register
class CPOT(Criterion):
    """Keep the channels that are far from the Wasserstein barycenter of their layer.

    Every channel becomes a probability law, `measure` says how. What lies near the barycenter is
    what all the others say already, and goes first. Batch-norms are folded in before weights are
    read, each producer of a residual stream is brought to size one by itself, and channels whose
    laws are alike are told apart by the Euclidean distance of their weights from the mean.

    What is as near to nothing as to the barycenter is no outlier either: a channel's score is the
    smaller of both distances, or the smallest filters of a layer would stay with the largest.

    A dead channel (no weights, or a signal that does not vary) is no law to compare: it scores
    nothing, goes first and does not move the barycenter. With three live channels or fewer no
    distance to a centre means anything: these are ranked by the size of their weights. Both, and
    every measure that a layer does not have, stand in the plan's notes.

    Limits: marginal laws only, so two channels that never fire together may look alike, and on
    networks with batch-norm `fpgm` did better in our runs; `weights` does not see where in a
    filter a value stands, and so mostly how far its size is from the average one; copies that are
    far from one barycenter all stay; the scale of an instance-, group- or layer-norm behind a
    filter is unknown and taken as one; `greedy` solves one barycenter per channel, which with
    `taps` takes seconds from 64 channels on.

    Source: the idea of the abstract of CPOT (Huang et al. 2020); how channels become laws, and
    that near means redundant as in FPGM (He et al. 2019), are ours. Agueh & Carlier 2011 for
    barycenters, Janati et al. 2020 for the debiased one.
    """

    kind: Literal["cpot"] = "cpot"
    measure: Literal["weights", "taps", "activations", "gaussian"] = Field(
        default="weights",
        description="what makes a law: the values of a filter, its mass by kernel position, the "
        "values of the channel's signal, or mean and covariance of its patches",
    )
    p: Literal[1, 2] = Field(default=2, description="order of the distance")
    normalise: Literal["none", "std", "l2"] = Field(
        default="none",
        description="leave every channel's size, so that it counts as well, or bring it to a "
        "standard deviation or a root mean square of one",
    )
    k_barycenters: int | Literal["kept"] = Field(
        default=1,
        description="centres to be near to; above 1 the medoid of each stays first; `kept` takes "
        "as many as channels stay and keeps the medoids",
    )
    mode: Literal["one_shot", "greedy"] = Field(
        default="one_shot", description="whether the barycenter moves as channels go"
    )
    eps: float = Field(
        default=0.02, gt=0, description="temperature of `taps`, relative to the mean cost"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse settings that contradict each other."""
        if self.k_barycenters != "kept" and self.k_barycenters < 1:
            raise PolicyError(
                f"k_barycenters is {self.k_barycenters}.",
                where="CPOT.k_barycenters",
                fix="ask for at least one centre.",
            )
        if self.measure == "gaussian" and self.p != 2:
            raise PolicyError(
                "Gaussians have a barycenter in closed form for p=2 alone, and p is 1.",
                where="CPOT.p with measure='gaussian'",
                fix="leave p at 2, or choose measure='activations'.",
            )
        if self.mode == "greedy" and self.k_barycenters != 1:
            raise PolicyError(
                f"greedy moves one barycenter, and k_barycenters is {self.k_barycenters}.",
                where="CPOT.mode and CPOT.k_barycenters",
                fix="leave one of them out.",
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # depends on a setting
        """Say what has to be gathered: the laws of signals need data, those of weights none."""
        by_measure: dict[str, frozenset[Need]] = {
            "activations": frozenset({"signals"}),
            "gaussian": frozenset({"moments"}),
        }
        return by_measure.get(self.measure, frozenset())

    def rank(self, evidence: Evidence) -> Ranking:
        """Order by distance to the barycenter; what a set costs is the squared distance left out.

        Args:
            evidence: what is known about the group.

        Returns:
            the ranking, with a note where a fallback decided.
        """
        seen = self._seen(evidence)
        live = seen.live.nonzero().flatten()
        order, score, notes = self._ordered(seen, live)
        dead = (~seen.live).nonzero().flatten()
        power = torch.cat([score[order], score.new_zeros(len(dead))]).square()
        left = power.flip(0).cumsum(0).flip(0)
        curve = torch.cat([left, left.new_zeros(1)]) / power.sum().clamp_min(1e-300)
        return Ranking(torch.cat([order, dead]), curve, "; ".join([*seen.notes, *notes]))

    def refine(self, evidence: Evidence, keep: Int[Tensor, " kept"]) -> Int[Tensor, " kept"]:
        """Keep the medoids of as many clusters, where `k_barycenters` is `kept`."""
        if self.k_barycenters != "kept":
            return keep
        seen = self._seen(evidence)
        live = seen.live.nonzero().flatten()
        if len(live) <= max(len(keep), _FEW):
            return keep
        medoids = _clusters(seen, live, keep)[1]
        rest = [int(unit) for unit in keep if int(unit) not in medoids]
        return torch.tensor([*medoids, *rest][: len(keep)], device="cpu")

    def _seen(self, evidence: Evidence) -> Seen:
        """Turn the units into laws, and refuse numbers that are none."""
        checked(evidence.producers.sum(1), "unit", where=f"group '{evidence.name}'")
        return MEASURES[self.measure](evidence, self.p, self.normalise, self.eps)

    def _ordered(self, seen: Seen, live: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """Rank the live units."""
        if len(live) <= _FEW:
            text = f"{len(live)} live channels have no centre to speak of; ranked by weight norm"
            return _sorted(live, seen.size), settle(seen.size), [text]
        if self.mode == "greedy":
            return *_greedy(seen, live), []
        wanted = 1 if self.k_barycenters == "kept" else self.k_barycenters
        if wanted == 1:
            far = _lost(seen, live)
            return _sorted(live, far, _aside(seen, live)), settle(far), []
        count = min(wanted, len(live))
        start = _sorted(live, _lost(seen, live), _aside(seen, live))[:count]
        far, medoids = _clusters(seen, live, start)
        rest = [unit for unit in _sorted(live, far, _aside(seen, live)).tolist()
                if unit not in medoids]  # fmt: skip
        score = far.clone()
        score[medoids] = far.max() if float(far.max()) > 0 else 1.0
        order = torch.tensor([*medoids, *rest], device="cpu")
        few = wanted > len(live)
        notes = [f"{len(live)} centres and not {wanted}: no more channels are alive"] if few else []
        return order, settle(score), notes


def _sorted(live: Tensor, *keys: Tensor) -> Tensor:
    """Sort units by falling keys, the first before the others; ties go by number."""
    order = live
    for key in reversed(keys):
        order = order[torch.argsort(settle(key)[order], descending=True, stable=True)]
    return order


def _lost(seen: Seen, members: Tensor) -> Float[Tensor, " units"]:
    """Measure how far every unit is from the barycenter of some, or from nothing."""
    return torch.minimum(seen.laws.far(seen.laws.centre(members)), seen.laws.size())


def _aside(seen: Seen, live: Tensor) -> Float[Tensor, " units"]:
    """Break ties: laws do not see where in a filter a value stands, Euclidean distances do."""
    return (seen.rows - seen.rows[live].mean(0)).square().sum(1)


def _greedy(seen: Seen, live: Tensor) -> tuple[Tensor, Tensor]:
    """Take the unit nearest to the barycenter of those left, again and again."""
    left, gone, score = live, list[Tensor](), torch.zeros_like(seen.size)
    while len(left) > _FEW:
        far = _lost(seen, left)
        unit = _sorted(left, far, _aside(seen, left))[-1]
        # as units go the centre moves: a score that fell back would cost less than one before it
        score[unit] = max(float(far[unit]), max((float(score[u]) for u in gone), default=0.0))
        gone.append(unit)
        left = left[left != unit]
    far = _lost(seen, left)
    top = max(float(far[left].max()), max((float(score[u]) for u in gone), default=0.0))
    score[left] = top
    last = _sorted(left, seen.size)
    return torch.cat([last, torch.stack(gone[::-1])]), settle(score)


def _clusters(seen: Seen, live: Tensor, start: Tensor) -> tuple[Tensor, list[int]]:
    """Run k-means in Wasserstein space from given units.

    Returns:
        every unit's distance to its own centre, and one medoid per centre.
    """
    laws, owner = seen.laws, None
    centres = [laws.centre(unit[None]) for unit in start]
    for _ in range(_ROUNDS):
        far = torch.stack([laws.far(centre) for centre in centres], dim=1)
        new = settle(far).argmin(1)
        if owner is not None and torch.equal(new, owner):
            break
        owner = new
        centres = list(_moved(laws, live, owner, centres, far.gather(1, owner[:, None])[:, 0]))
    far = torch.stack([laws.far(centre) for centre in centres], dim=1)
    owner = settle(far).argmin(1)
    medoids = []
    for k in range(len(centres)):
        members = live[owner[live] == k]
        if len(members):
            medoids.append(int(members[settle(far)[members, k].argmin()]))
    return torch.minimum(far.gather(1, owner[:, None])[:, 0], laws.size()), medoids


def _moved(
    laws: Laws, live: Tensor, owner: Tensor, centres: list[Any], far: Tensor
) -> Iterator[Any]:
    """Move every centre to the barycenter of its units, one that has none to the worst served."""
    # centres that start at copies of one unit would all but one stay idle there
    worst = iter(_sorted(live, far).tolist())
    for k, centre in enumerate(centres):
        members = live[owner[live] == k]
        if not len(members) and float(far[unit := next(worst)]) > 0:
            members = live.new_tensor([unit])
        yield laws.centre(members) if len(members) else centre
