"""Rankings and a budget in, one frozen plan out."""

from torch_otprune.plan.build import make_plan
from torch_otprune.plan.depth import owned_blocks  # and registers its proposer
from torch_otprune.plan.model import Cost, Cut, Drop, Plan, Refusal, Slice

__all__ = ["Cost", "Cut", "Drop", "Plan", "Refusal", "Slice", "make_plan", "owned_blocks"]
