"""Rankings and a budget in, one frozen plan out."""

from torch_otprune.plan.build import make_plan
from torch_otprune.plan.depth import owned_blocks, stand_ins  # and registers its proposer
from torch_otprune.plan.linearize import check_lines, owned_sites
from torch_otprune.plan.model import (
    Cost,
    Cut,
    Drop,
    Folding,
    Line,
    Plan,
    Refusal,
    Slice,
    Thinning,
    Trial,
)
from torch_otprune.plan.weights import check_weights, weight_rules

__all__ = [
    "Cost",
    "Cut",
    "Drop",
    "Folding",
    "Line",
    "Plan",
    "Refusal",
    "Slice",
    "Thinning",
    "Trial",
    "check_lines",
    "check_weights",
    "make_plan",
    "owned_blocks",
    "owned_sites",
    "stand_ins",
    "weight_rules",
]
