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
    Setting,
    Table,
)
from torch_otprune.policy.rules import Channels, Layers, Linearize, Rule
from torch_otprune.policy.targets import match, module_classes, owner

__all__ = [
    "CRITERIA",
    "LAYER_CRITERIA",
    "PENALTIES",
    "REPAIRS",
    "REPLACEMENTS",
    "RULES",
    "Amount",
    "Budget",
    "Calibration",
    "Channels",
    "Layers",
    "Linearize",
    "Policy",
    "Rule",
    "Setting",
    "Table",
    "match",
    "module_classes",
    "owner",
    "policy_of",
    "prunable",
]
