"""Which penalties a policy puts on which modules."""

from __future__ import annotations

from torch import nn

from torch_otprune.plan import owned_blocks
from torch_otprune.policy import Policy
from torch_otprune.structure import Graph
from torch_otprune.training import Penalty, Pressure

__all__ = ["pressures"]


def pressures(model: nn.Module, policy: Policy, graph: Graph) -> tuple[Pressure, ...]:
    """Put the penalties of a policy's layer rules to work.

    Args:
        model: the model, which is about to be trained.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        one pressure per rule that has a penalty and owns a block.
    """
    found = []
    for index, blocks in owned_blocks(model, policy, graph).items():
        penalty = policy.rules[index].penalty  # type: ignore[attr-defined]
        paths = [block.name for block in blocks if block.kind == "block"]
        if isinstance(penalty, Penalty) and paths:
            found.append(Pressure(model, paths, penalty, seed=policy.seed + index))
    return tuple(found)
