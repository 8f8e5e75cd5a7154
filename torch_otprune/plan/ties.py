"""One width for all layers of a kind: their groups share one variable of the allocation.

Tied groups are one choice whose curve is the sum of theirs, and whose name stands for all of them
in the costs: exact for every solver, and a smaller problem than without ties.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from torch_otprune.errors import BudgetError
from torch_otprune.plan.choice import Choice
from torch_otprune.structure.configs import Strict, refused
from torch_otprune.structure.graph import CostModel, Dim, Group, Term

__all__ = ["kinds", "sayable", "tie", "untie"]

_SIDES = ("encoder", "decoder")


def kinds(model: nn.Module, groups: Iterable[Group]) -> dict[str, str]:
    """Name for every group the group that stands for all of its kind.

    Groups are of one kind where one number of a configuration speaks of all of them: as many
    units of one sort under one class of configuration, on one side where it tells sides apart.
    Without a configuration, where their paths are equal but for the numbers of layers.

    Args:
        model: the dense model.
        groups: of its analysis.

    Returns:
        group to the first of its kind; a group that is alone stands for itself.
    """
    first: dict[tuple[object, ...], str] = {}
    return {
        group.name: first.setdefault((group.kind, group.units, *_field(model, group)), group.name)
        for group in groups
    }


def _field(model: nn.Module, group: Group) -> tuple[object, ...]:
    parts = group.name.split(".")
    config = _config(model, parts)
    if config is None:
        return ("", *("*" if part.isdecimal() else part for part in parts))
    side = next((part for part in reversed(parts) if part in _SIDES), "")
    own = side and any(
        key.startswith(f"{side}_") and value == group.units for key, value in vars(config).items()
    )
    return type(config), side if own else ""


def _config(model: nn.Module, parts: Sequence[str]) -> object | None:
    """Find the configuration of the innermost module around a path that has one."""
    found, module = vars(model).get("config"), model
    for part in parts:
        inner = module._modules.get(part)
        if inner is None:
            break
        module = inner
        found = vars(module).get("config", found)
    return found if hasattr(found, "__dict__") else None


def sayable(model: nn.Module, groups: Iterable[Group], choices: Iterable[Choice]) -> list[Choice]:
    """Leave out numbers of heads that a configuration refuses.

    Args:
        model: the dense model.
        groups: of its analysis.
        choices: what they may keep, and others.

    Returns:
        the same with fewer widths; unchanged where none would be left.
    """
    named = {group.name: group for group in groups}
    return [_said(model, named[c.name], c) if c.name in named else c for c in choices]


def _said(model: nn.Module, group: Group, choice: Choice) -> Choice:
    config = _config(model, group.name.split("."))
    if group.kind != "heads" or not isinstance(config, Strict):
        return choice
    fields = {
        key: value // group.units
        for key, value in vars(config).items()
        if "heads" in key and type(value) is int and value and value % group.units == 0
    }
    made = copy.copy(config)

    def said(width: int) -> bool:
        for key, each in fields.items():
            object.__setattr__(made, key, each * width)
        return not refused(made)

    widths = tuple(filter(said, choice.widths))
    return replace(choice, widths=widths) if widths else choice


def tie(
    choices: Sequence[Choice], costs: Mapping[str, CostModel], kind: Mapping[str, str]
) -> tuple[list[Choice], dict[str, CostModel]]:
    """Make one choice of all that must be alike.

    Args:
        choices: one per group.
        costs: by measure.
        kind: group to the one that stands for it; others stand for themselves.

    Returns:
        fewer choices, and the same costs in their names.

    Raises:
        BudgetError: if groups of a kind have no width in common.
    """
    together: dict[str, list[Choice]] = {}
    for choice in choices:
        together.setdefault(kind.get(choice.name, choice.name), []).append(choice)
    joined = [_joined(name, alike) for name, alike in together.items()]
    renamed = {
        measure: replace(cost, terms=tuple(_told(term, kind) for term in cost.terms))
        for measure, cost in costs.items()
    }
    return joined, renamed


def untie(keep: Mapping[str, int], kind: Mapping[str, str], names: Iterable[str]) -> dict[str, int]:
    """Give every group the width of the one that stands for it.

    Args:
        keep: widths of those that stand for others.
        kind: group to the one that stands for it.
        names: every group.

    Returns:
        the width of every group.
    """
    return {name: keep[kind.get(name, name)] for name in names}


def _joined(name: str, alike: Sequence[Choice]) -> Choice:
    if len(alike) == 1:
        return replace(alike[0], name=name)
    widths = set(alike[0].widths).intersection(*(choice.widths for choice in alike))
    if not widths:
        said = (f"{c.name}: {', '.join(map(str, c.widths[:4]))}" for c in alike)
        raise BudgetError(
            "layers of a kind must keep equally many units, and their rules leave no number that "
            "all of them may keep.",
            where=f"Policy.serving = 'uniform'; {'; '.join(list(said)[:4])}",
            fix="give them one rule, or ask for serving='registered'.",
        )
    # Summed in one order, so that the order in which groups come changes no bit.
    curves = [choice.curve for choice in sorted(alike, key=lambda choice: choice.name)]
    lowest = [torch.cummin(curve.double().cpu(), 0).values for curve in curves]
    return Choice(name, torch.stack(lowest).sum(0), tuple(sorted(widths)))


def _told(term: Term, kind: Mapping[str, str]) -> Term:
    return replace(term, dims=tuple(_renamed(dim, kind) for dim in term.dims))


def _renamed(dim: Dim, kind: Mapping[str, str]) -> Dim:
    total: Counter[str] = Counter()
    for name, width in dim.by_group:
        total[kind.get(name, name)] += width
    return Dim(dim.fixed, tuple(total.items()))
