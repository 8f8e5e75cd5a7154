"""Fuse units instead of dropping them: what goes is averaged into what stays, by transport."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from torch_otprune.criteria.base import Need
from torch_otprune.errors import PolicyError
from torch_otprune.plan.model import Cut
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.decode import Decoder
from torch_otprune.repair.lockstep import distance
from torch_otprune.repair.matching import Cost, Marginals, Matching, Target, fused, maps
from torch_otprune.repair.moves import Carrier, Move
from torch_otprune.repair.places import objection, selections
from torch_otprune.repair.profile import Features, profile
from torch_otprune.structure.graph import Group
from torch_otprune.structure.layers import shared

__all__ = ["Coupling"]

_GUARD = 4  # batches on which a merge must not do harm


@register
class Coupling(Repair):
    """Fuse all units of a group into those that the plan keeps.

    A coupling of all units with the kept ones says what joins what. Each kept unit's producers
    write the mean of the units that joined it, and the consumers read each old unit as a mean of
    the new ones: units that are copies of each other lose nothing, whatever their number. A
    batch-norm behind a producer is part of the mean. Then `scale` may correct what the consumers
    read, from data: each signal's variance, or each signal as a least-squares combination of those
    that are left, which contains every other choice.

    Groups are fused in order of execution. A group whose fusion moves the output further from the
    dense model's than dropping is left as it was cut, and noted; without calibration batches
    nothing can be compared, and all are fused. Name it before other repairs: a group that was
    written since the cut is left alone. Under a budget, widths are priced by what a refit of the
    consumers leaves where `scale` is `least_squares`, and by what dropping changes otherwise.

    Limits: what several layers add up is fused with one coupling for all of them; a nonlinearity
    between means is not seen; a layer-norm over fused channels keeps its function only where
    every unit stands for as many. Experts, and layers that share tensors, are left alone. Borders
    of a zero-padded convolution feel the shift of a mean. The price lets every kernel position be
    refitted by itself, and so is too low where convolutions read the units.

    Source: Theus et al. 2024 (Intra-Fusion), Algorithm 2, reached by `features="group"`,
    `marginals="uniform"`, `normalise="published"`, `scale="none"`; Singh & Jaggi 2020 for fusion
    by couplings. The published map has rows of sum one on both sides, and so writes n/m times too
    much where units are copies; that producers average while consumers distribute, and the
    decoding from data, are ours.
    """

    kind: Literal["coupling"] = "coupling"
    features: Features = Field(
        default="producers",
        description="what units are compared by: the weights that write them, with those that "
        "read them as well, or their signals on the calibration data",
    )
    target: Target = Field(
        default="topk",
        description="what they are coupled with: the kept units, centroids of the nearest units, "
        "or the support of their Wasserstein barycenter",
    )
    cost: Cost = Field(
        default="l1",
        description="between features: l1 of rows of length one, Euclidean of rows as they are, "
        "or one minus the cosine",
    )
    marginals: Marginals = Field(
        default="semi_relaxed",
        description="how much each kept unit takes in: as much as every other, in proportion to "
        "its weights, about as much at the price `reach`, or whatever is nearest to it",
    )
    reach: float = Field(
        default=1.0, gt=0, description="price of an uneven share in `unbalanced`, of the mean cost"
    )
    eps: float | None = Field(
        default=None, ge=0, description="temperature, of the mean cost; exact if null or 0"
    )
    solver: str = Field(default="auto", description="a line of the transport's dispatch table")
    normalise: Literal["preserving", "published"] = Field(
        default="preserving",
        description="producers average and consumers distribute, or both sum as in the paper",
    )
    scale: Literal["none", "variance", "least_squares"] = Field(
        default="least_squares", description="what data correct afterwards; `none` needs no data"
    )
    ridge: float | None = Field(
        default=None, gt=0, description="of `least_squares`; chosen by hold-out if null"
    )
    guard: bool = Field(
        default=True, description="leave a group cut where fusing it makes the output worse"
    )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # depends on a setting
        """Ask for what the price of a refit takes."""
        return frozenset({"moments"}) if self.refits else frozenset()

    @property
    def refits(self) -> bool:  # type: ignore[override]  # depends on a setting
        """Tell whether consumers read combinations that data choose, which is a refit by unit."""
        return self.scale == "least_squares"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse settings that contradict each other."""
        if self.marginals == "unbalanced" and self.eps == 0:
            raise PolicyError(
                "an unbalanced coupling has no exact solver here, and eps is 0.",
                where="Coupling.eps with marginals='unbalanced'",
                fix="leave eps out, or set it to 0.01.",
            )
        if self.normalise == "published" and self.scale == "least_squares":
            raise PolicyError(
                "least squares replaces the map that normalise='published' asks for.",
                where="Coupling.scale with normalise='published'",
                fix="write scale='none' as in the paper, or leave normalise out.",
            )
        return self

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Fuse group after group."""
        moves, ties = selections(patient), shared(patient.dense)
        carrier = Carrier(patient.dense, patient.small, patient.graph, moves, ties=ties)
        cuts = {c.group: c for c in patient.cuts if len(c.keep) < c.units}
        groups = [group for group in patient.graph.groups if group.name in cuts]
        # all are asked before the first is written
        objections = [objection(patient, group, carrier) for group in groups]
        notes = []
        for group, why in zip(groups, objections, strict=True):
            left = Note(self.kind, group.name, None, None, accepted=False, text=why)
            notes.append(left if why else self._fuse(patient, carrier, group, cuts[group.name]))
            patient.progress(self.kind, len(notes), len(groups))
        return tuple(notes)

    def _fuse(self, patient: Patient, carrier: Carrier, group: Group, cut: Cut) -> Note:
        """Fuse one group, and take it back where it does harm."""
        batches = patient.batches[:_GUARD] if self.guard else []
        before = distance(patient.dense, patient.small, batches) if batches else None
        chosen = carrier.moves[group.name]
        move, text = self._coupled(patient, group, chosen, cut)
        carrier.write_(move)
        if self.scale != "none" and patient.batches:
            self._decode_(patient, carrier, move)
        if before is None:
            return Note(self.kind, group.name, None, None, accepted=True, text=text)
        after = distance(patient.dense, patient.small, batches)
        if after <= before:
            return Note(self.kind, group.name, before, after, accepted=True, text=text)
        carrier.back_(chosen)
        text = f"the output's squared error would rise to {after:.2e}"
        return Note(self.kind, group.name, before, before, accepted=False, text=text)

    def _coupled(self, patient: Patient, group: Group, chosen: Move, cut: Cut) -> tuple[Move, str]:
        """Couple all units with the kept ones; say what had to be done without."""
        found = profile(
            patient.dense,
            patient.graph,
            group,
            self.features,
            batches=patient.batches,
            seed=patient.seed,
        )
        keep = torch.tensor(cut.keep, device="cpu")
        matching = Matching(self.cost, self.marginals, self.reach, self.eps, self.solver)
        plan = fused(found, keep, matching, self.target)
        out, into = maps(plan, keep, published=self.normalise == "published")
        dead = int((found.square().sum(1) == 0).sum())
        said = [f"{dead} dead units joined nothing"] if dead else []
        if self.scale != "none" and not patient.batches:
            said.append(f"without batches there is nothing for scale='{self.scale}' to learn from")
        return replace(chosen, out=out, into=into, plain=False), "; ".join(said)

    def _decode_(self, patient: Patient, carrier: Carrier, move: Move) -> None:
        """Let the consumers read what data say they should."""
        readers = {}
        for decoded in Decoder(patient, move, self.scale == "least_squares", self.ridge).fitted():
            readers[decoded.path] = decoded.read
            if decoded.shift is not None:
                key, by = decoded.shift
                carrier.shifts[key][move.group] = by
        carrier.write_(replace(move, readers=readers))
