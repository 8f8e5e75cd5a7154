"""Rankings and a budget in, one frozen plan out."""

from torch_otprune.plan.build import make_plan
from torch_otprune.plan.model import Cost, Cut, Plan, Refusal, Slice

__all__ = ["Cost", "Cut", "Plan", "Refusal", "Slice", "make_plan"]
