"""Which penalties a policy puts on which modules."""

from __future__ import annotations

from torch import nn

from torch_otprune.errors import PolicyError
from torch_otprune.plan import owned_blocks, owned_sites
from torch_otprune.policy import Policy
from torch_otprune.structure import Graph
from torch_otprune.training import Penalty, Pressure

__all__ = ["pressures"]


def pressures(model: nn.Module, policy: Policy, graph: Graph) -> tuple[Pressure, ...]:
    """Put the penalties of a policy's rules about layers and activations to work.

    Args:
        model: the model, which is about to be trained.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        one pressure per rule that has a penalty and owns a block, or an activation that can
        become linear.

    Raises:
        PolicyError: if a rule with a penalty owns halves of layers only.
    """
    blocks = owned_blocks(model, policy, graph)
    sites = owned_sites(model, policy, graph)
    watched = {i: [b.name for b in found if b.kind == "block"] for i, found in blocks.items()}
    watched |= {i: [s.module for s in found if not s.reason] for i, found in sites.items()}
    found = []
    for index, paths in watched.items():
        penalty = policy.rules[index].penalty  # type: ignore[attr-defined]
        if isinstance(penalty, Penalty) and not paths and blocks.get(index):
            raise PolicyError(
                "a penalty compares a layer's output with its input, which a half does not have.",
                where=f"Policy.rules[{index}].penalty",
                fix="target whole layers, or leave the penalty out.",
            )
        if isinstance(penalty, Penalty) and paths:
            found.append(Pressure(model, paths, penalty, seed=policy.seed + index))
    return tuple(found)
