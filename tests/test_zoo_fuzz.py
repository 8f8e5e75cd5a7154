"""Random nets whose forward counts no channels: every group that is found can go, exactly."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tests.zoo.entry import Entry
from tests.zoo.oracle import Case
from tests.zoo.random_nets import Chain, nets
from torch_otprune.structure.graph import Group

TOLERANCE = 1e-5
_PLACED = re.compile(r"cut and masked outputs differ by .* \(at \S+:\d+\)$")
MANY = int(os.environ.get("OTPRUNE_FUZZ", "1500"))


def built(ops: list[Any]) -> Case:
    """Put a first and a last layer around the ops, and analyse the net."""

    def build() -> nn.Module:
        body = Chain([("conv", 5, 3), *ops], 3, (4, 3))
        return nn.Sequential(
            body, nn.Conv2d(body.width, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def example() -> torch.Tensor:
        return torch.randn(2, 3, 4, 3, generator=torch.Generator().manual_seed(1))

    return Case(Entry("random", build, example))


def wrong(case: Case, groups: Sequence[Group]) -> list[tuple[str, float, float, str]]:
    """Cut each group alone and all at once, and list what disagrees."""
    sets = {g.name: [g] for g in groups} | {"all at once": groups}
    found = []
    for ratio in (0.3, 0.7):
        for name, some in sets.items():
            far, said = case.compared(some, ratio)
            if not far < TOLERANCE:
                found.append((name, ratio, far, said))
    return found


def holds(ops: list[Any]) -> None:
    case = built(ops)
    groups, counted = list(case.graph.groups), set[str]()
    if "shuffle" in str(ops):  # so many groups is a number, and it may count what goes
        counted = {name for name, _, _, said in wrong(case, groups) if _PLACED.search(said)}
    assert not wrong(case, [g for g in groups if g.name not in counted]), f"net: {ops}"
    assert all(b.reason and b.fix for b in case.graph.blocked)


@settings(max_examples=160)
@given(nets())
def test_what_is_found_in_a_random_net_goes_exactly(ops: list[Any]) -> None:
    holds(ops)


@pytest.mark.zoo
@settings(max_examples=MANY, derandomize=False)
@given(nets())
def test_what_is_found_in_many_random_nets_goes_exactly(ops: list[Any]) -> None:
    holds(ops)


def test_a_shuffle_that_counts_its_groups_is_refused_by_the_trial_with_op_and_line() -> None:
    case = built([("conv", 4, 1), ("dense", [("group_norm", 2)]), ("shuffle", 4)])
    told = {name: said for name, _, _, said in wrong(case, case.graph.groups)}
    assert told.keys() == {"0.parts.1", "all at once"}
    assert _PLACED.search(told["0.parts.1"])
    holds([("conv", 4, 1), ("dense", [("group_norm", 2)]), ("shuffle", 4)])
