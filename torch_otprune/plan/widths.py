"""How many units a rule lets a group keep."""

from __future__ import annotations

from torch_otprune.errors import StructureError
from torch_otprune.policy import Units
from torch_otprune.structure.graph import Group

__all__ = ["allowed_widths"]


def allowed_widths(group: Group, index: int, rule: Units) -> tuple[int, ...]:
    """List how many units may stay: of a mixture, at least as many as its router chooses.

    Args:
        group: of units.
        index: of the rule, for errors.
        rule: that owns the group.

    Returns:
        ascending counts; a single one where the rule says how many stay.

    Raises:
        StructureError: if the rule keeps fewer experts than the router chooses.
    """
    keep, least = rule.keep, group.least
    if keep is not None and not keep.relative and keep.value < least:
        raise StructureError(
            f"keep is {keep.value} of the {group.units} experts of '{group.name}', whose router "
            f"chooses {least} for every token.",
            where=f"Policy.rules[{index}].keep",
            fix=f"keep at least {least}, or lower the model's top-k first.",
        )
    step = rule.multiple_of
    allowed = [w for w in rule.widths(group.units) if w >= least]
    if not allowed:  # a share asks for fewer
        floor = max(rule.min_keep, least)
        allowed = [min(-(-floor // step) * step, group.units)]
    return tuple(allowed)
