"""What the user declares: policies, rules, budgets, and the tables they draw from."""

from torch_otprune.policy.amount import Amount
from torch_otprune.policy.declare import policy_of, prunable
from torch_otprune.policy.model import Budget, Calibration, Policy
from torch_otprune.policy.registry import (
    CRITERIA,
    LAYER_CRITERIA,
    PENALTIES,
    REPAIRS,
    REPLACEMENTS,
    RULES,
    WEIGHT_CRITERIA,
    Setting,
    Table,
)
from torch_otprune.policy.rules import Layers, Linearize, Rule
from torch_otprune.policy.schedule import Schedule
from torch_otprune.policy.targets import match, module_classes, owner
from torch_otprune.policy.weights import Pattern, Weights
from torch_otprune.policy.width import Channels, Experts, Heads, Hidden, Units

__all__ = [
    "CRITERIA",
    "LAYER_CRITERIA",
    "PENALTIES",
    "REPAIRS",
    "REPLACEMENTS",
    "RULES",
    "WEIGHT_CRITERIA",
    "Amount",
    "Budget",
    "Calibration",
    "Channels",
    "Experts",
    "Heads",
    "Hidden",
    "Layers",
    "Linearize",
    "Pattern",
    "Policy",
    "Rule",
    "Schedule",
    "Setting",
    "Table",
    "Units",
    "Weights",
    "match",
    "module_classes",
    "owner",
    "policy_of",
    "prunable",
]
