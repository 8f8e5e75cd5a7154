"""From kept units to what every module keeps."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from torch_otprune.plan.model import Slice
from torch_otprune.structure.graph import Group

__all__ = ["slices"]


def slices(group: Group, keep: Int[Tensor, " kept"]) -> tuple[Slice, ...]:
    """Spell out a cut module by module.

    Args:
        group: what is cut.
        keep: units that stay.

    Returns:
        one slice per member; channels of a module that belong to no unit of this group stay.
    """
    gone = torch.ones(group.units, dtype=torch.bool, device="cpu")
    gone[keep] = False
    found = []
    for member in group.members:
        stay = torch.ones(member.size, dtype=torch.bool, device="cpu")
        stay[member.index[gone].flatten()] = False
        kept = tuple(stay.nonzero().flatten().tolist())
        found.append(Slice(path=member.path, side=member.side, size=member.size, keep=kept))
    return tuple(found)
