"""The channel methods that `methods_cifar10.py` compares, each with the repair of its own paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FLAGSHIP", "OURS", "REPAIRS", "Method", "methods"]

FLAGSHIP = "transport"
OURS = "least_squares"
REPAIRS = ("none", "own", OURS)
# Masks that are learned while a network trains have a benchmark of their own.
TRAINED = frozenset({"dtp"})
Repair = str | dict[str, Any]
Repairs = tuple[Repair, ...]

# Their papers retrain after the cut: batch-norms estimated anew are the part of that which needs
# neither labels nor steps.
NORM: Repairs = ("norm",)
PLAIN: dict[str, Any] = {
    "kind": "least_squares", "scope": "consumers", "drift": False, "one_sided": 0,
}  # fmt: skip
PUBLISHED: dict[str, Any] = {
    "kind": "coupling", "features": "group", "marginals": "uniform", "normalise": "published",
    "scale": "none", "guard": False,
}  # fmt: skip
OWN: Mapping[str, Repairs] = {
    "activation": ("bias",),  # as in FLAP
    "obs": (PLAIN,),  # the update of optimal brain surgery
    "transport": ("coupling",),  # what is moved is fused
}
LI: dict[str, Any] = {"kind": "magnitude", "p": 1.0}
VARIANTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "cpot": {
        "cpot": {},
        "cpot, taps": {"measure": "taps"},
        "cpot, activations": {"measure": "activations"},
        "cpot, gaussian": {"measure": "gaussian"},
    }
}


@dataclass(frozen=True)
class Method:
    """A criterion and the repairs it is tried with.

    Args:
        name: in the results.
        criterion: with its settings.
        repairs: label to repairs.
        recipe: whether it is there only to run a published recipe, at equal widths.
        data: whether its choice depends on the calibration images where widths are given.
    """

    name: str
    criterion: dict[str, Any]
    repairs: Mapping[str, Repairs]
    recipe: bool = False
    data: bool = True


def methods() -> dict[str, Method]:
    """List every registered channel criterion that needs no training, and the fusions.

    Returns:
        name to method; a criterion that is registered later joins by itself.
    """
    from torch_otprune.policy.registry import CRITERIA

    found = []
    for kind in (k for k in CRITERIA if k not in TRAINED):
        repairs = {"none": (), "own": OWN.get(kind, NORM), OURS: (OURS,)}
        for name, settings in VARIANTS.get(kind, {kind: {}}).items():
            criterion = {"kind": kind, **settings}
            # seeds choose for `random`
            data = bool(CRITERIA.resolve(criterion).needs) or kind == "random"
            found.append(Method(name, criterion, repairs, data=data))
    fusion: dict[str, Repairs] = {"own": ("coupling",), OURS: ("coupling", OURS)}
    found.append(Method("intra_fusion", LI, fusion, data=False))
    published: dict[str, Repairs] = {"none": (PUBLISHED,), "own": (PUBLISHED, "norm")}
    found.append(Method("intra_fusion, published", LI, published, recipe=True, data=False))
    return {method.name: method for method in found}
