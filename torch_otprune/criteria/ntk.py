"""The tangent kernel: how much training could still move the output through each unit."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import Criterion, Need, Ranking, checked, register, settle
from torch_otprune.errors import CalibrationError
from torch_otprune.policy.registry import CRITERIA
from torch_otprune.statistics.evidence import Evidence

__all__ = ["NTK"]

_LEAST = 1e-12  # of a group: what is left of it counts as at least so much


@register
class NTK(Criterion):
    """Share the budget out so that every layer keeps its part of the neural tangent kernel.

    A unit holds `|J_g|^2` of the kernel's trace: the squared gradients of the outputs by all
    parameters that go with it, summed over samples (its output-Fisher score). A group that holds
    the share `r` of the trace and keeps the part `q` of that costs `r log(1/q)`: the relative
    entropy between the shares of the layers before and after. No layer can be emptied at a finite
    price, and where all units are alike the best widths are proportional to `r` over the price of
    a unit.

    By default this decides how many units of each layer stay, and `within` decides which: scores
    of this kind mostly find good widths, and networks pruned by them at initialisation were as
    good with the choice shuffled inside every layer. `role="ranking"` lets the score choose the
    units as well; have evidence before you use it.

    Limits: first order in the network as it stands; prices are no errors of the output, and do not
    compare with those of other rules under the same budget; parameters computed from others, such
    as under weight norm, are not counted.

    Source: Jacot et al. 2018 for the kernel; Wang, Li & Sun 2023 (NTK-SAP) for its trace as a
    score, there for single weights; Frankle et al. 2021 for shuffled choices; the score of a unit
    and the price are ours.
    """

    kind: Literal["ntk"] = "ntk"
    role: Literal["allocation", "ranking"] = Field(
        default="allocation",
        description="whether the kernel decides only how many units of each group stay, or which "
        "ones as well",
    )
    within: Literal["transport", "obs", "activation", "taylor", "magnitude", "fpgm", "random"] = (
        Field(default="transport", description="what ranks a group's units under `allocation`")
    )
    normalise: Literal["layer", "none"] = Field(
        default="layer",
        description="count gradients times the size of their layer's weights, which a norm behind "
        "makes arbitrary, or as they are",
    )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # depends on a setting
        """Ask for gradients, and for what the inner ranking asks."""
        own: frozenset[Need] = frozenset({"tangents"})
        return own | self._inner().needs if self.role == "allocation" else own

    def rank(self, evidence: Evidence) -> Ranking:
        """Order the units, and price each size by what is left of the group's share.

        Args:
            evidence: what is known about the group.

        Returns:
            the ranking, its curve in shares of the kernel.
        """
        share = self._share(evidence)
        notes = self._told(evidence, share)
        if self.role == "ranking":
            order = torch.argsort(share, descending=True, stable=True)
        else:
            inner = self._inner().rank(evidence)
            order = inner.order
            notes += [inner.note] if inner.note else []
        return Ranking(order, _price(share[order]), "; ".join(notes), unit="kernel")

    def refine(self, evidence: Evidence, keep: Int[Tensor, " kept"]) -> Int[Tensor, " kept"]:
        """Leave the choice to the inner ranking, where there is one."""
        return keep if self.role == "ranking" else self._inner().refine(evidence, keep)

    def _inner(self) -> Criterion:
        made = CRITERIA.resolve(self.within)
        assert isinstance(made, Criterion)
        return made

    def _share(self, evidence: Evidence) -> Float[Tensor, " units"]:
        if evidence.tangent is None:
            raise CalibrationError(
                "no gradients were gathered.",
                where=f"group '{evidence.name}', criterion ntk",
                fix="run calibration data through the model before planning.",
            )
        found = evidence.tangent
        share = found.free if self.normalise == "layer" else found.raw
        return checked(share, "unit", where=f"group '{evidence.name}', criterion ntk")

    def _told(self, evidence: Evidence, share: Tensor) -> list[str]:
        """Name what a reader should know."""
        assert evidence.tangent is not None
        notes = []
        if missed := evidence.tangent.missed:
            notes.append(f"no gradient of its own, not counted: {', '.join(missed)}")
        dead = (share <= _LEAST * float(share.max())).nonzero().flatten().tolist()
        if len(dead) == evidence.units:
            notes.append("the output does not depend on these units: their kernel is zero")
        elif dead:
            named = ", ".join(map(str, dead[:5])) + (", ..." if len(dead) > 5 else "")
            notes.append(f"units with no gradient: {named}")
        if self.role == "ranking":
            notes.append("ranked by the kernel inside the group, which shuffling often equals")
        return notes


def _price(share: Float[Tensor, " units"]) -> Float[Tensor, " sizes"]:
    """Price keeping the first k: the group's share times the log of how much of it goes."""
    whole = share.sum()
    if float(whole) <= 0:
        return torch.zeros(len(share) + 1, dtype=share.dtype, device=share.device)
    kept = torch.cat([whole.new_zeros(1), share.cumsum(0) / whole]).clamp(_LEAST, 1)
    kept[-1] = 1.0
    return settle(-whole * kept.log())
