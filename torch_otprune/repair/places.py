"""Where the units that a cut keeps ended up, and why they might not be fused."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torch_otprune.plan.model import Cut
from torch_otprune.repair.base import Patient
from torch_otprune.repair.moves import Carrier, Move
from torch_otprune.structure.graph import Group, Side
from torch_otprune.structure.layers import shared
from torch_otprune.surgery.cut import merged
from torch_otprune.surgery.exchange import gone

__all__ = ["objection", "selections"]

Stays = dict[tuple[str, Side], Tensor]
"""Module and side to the channels that stay."""


def selections(patient: Patient) -> list[Move]:
    """Describe every cut as what it is: some units stay, the others go.

    Args:
        patient: both models.

    Returns:
        one move per group that was cut; members that were taken out with a block are left out.
    """
    pieces = {(piece.path, piece.side): piece.keep for piece in merged(patient.every)}
    stays: Stays = {key: torch.tensor(keep, device="cpu") for key, keep in pieces.items()}
    cuts = [cut for cut in patient.every if patient.graph.group(cut.group).kind != "experts"]
    return [_selection(patient, cut, stays) for cut in cuts]


def _selection(patient: Patient, cut: Cut, stays: Stays) -> Move:
    group, keep = patient.graph.group(cut.group), torch.tensor(cut.keep, device="cpu")
    chosen = torch.zeros(cut.units, len(keep), dtype=torch.float64, device="cpu")
    chosen[keep, torch.arange(len(keep), device="cpu")] = 1.0
    old = tuple(m for m in group.members if not gone(patient.gone, m.path))
    new = tuple(
        replace(m, index=torch.searchsorted(stay, m.index[keep]), size=len(stay))
        for m in old
        for stay in [stays[m.path, m.side]]
    )
    return Move(cut.group, old, new, chosen, chosen, plain=True)


def objection(patient: Patient, group: Group, carrier: Carrier) -> str:
    """Say why a group cannot be fused; empty where it can.

    Args:
        patient: both models.
        group: one that was cut.
        carrier: that has written nothing yet.

    Returns:
        half a sentence.
    """
    if group.kind == "experts":
        return "experts are whole networks, and have no mean"
    if any(patient.heir(m.path) != m.path for m in carrier.moves[group.name].old):
        return "a layer of it was folded into another"
    touched, ties = carrier.touched(group.name), shared(patient.small)
    there = frozenset(name for name, _ in patient.small.named_modules())
    if not all(path in there for path, _ in touched):
        return "a layer of it is no longer where it was"
    if any(path in ties for path, _ in touched):
        return "shares a tensor with another layer"
    if not all(_as_cut(patient, carrier, path, name) for path, name in touched):
        return "was written since the cut: name coupling before other repairs"
    return ""


def _as_cut(patient: Patient, carrier: Carrier, path: str, name: str) -> bool:
    own = getattr(patient.small.get_submodule(path), name).detach()
    made = carrier.value(path, name).to(own)
    return made.shape == own.shape and torch.equal(made, own)
