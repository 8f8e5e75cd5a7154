"""Looking ahead: sets of blocks are tried together, and only those that could be next."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from math import nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.criteria.layers.look import Look, look_ahead, rising

NAMES = ["a", "b", "c", "d"]


class Table(Look):
    """Costs by formula: one per block, and one per pair."""

    def __init__(
        self, alone: dict[str, float], pairs: dict[tuple[str, str], float] | None = None
    ) -> None:
        self.alone, self.pairs = alone, pairs or {}
        self.tried: list[tuple[str, ...]] = []

    def __call__(self, gone: Collection[int]) -> float:
        return self.among([list(self.alone)[i] for i in gone])

    def among(self, gone: Collection[str]) -> float:
        self.tried.append(tuple(sorted(gone)))
        both = sum(cost for pair, cost in self.pairs.items() if set(pair) <= set(gone))
        return sum(self.alone[name] for name in gone) + both


def test_a_block_that_another_stands_in_for_does_not_go_with_it() -> None:
    look = Table({"a": 1.0, "b": 1.5, "c": 3.0, "d": 9.0}, {("a", "b"): 5.0})
    steps = look_ahead(look, NAMES, count=2, trials=64)
    assert steps is not None
    assert steps[:2] == [("a", 1.0), ("c", 3.0)]


def test_of_equal_blocks_the_last_goes_first() -> None:
    steps = look_ahead(Table(dict.fromkeys(NAMES, 1.0)), NAMES, count=4, trials=64)
    assert steps == [(name, 1.0) for name in reversed(NAMES)]


costs = st.floats(0.125, 8, width=16)


@given(
    alone=st.lists(costs, min_size=4, max_size=4, unique=True),
    pairs=st.lists(costs, min_size=6, max_size=6),
)
def test_looking_at_few_finds_what_looking_at_all_would(
    alone: list[float], pairs: list[float]
) -> None:
    places = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]
    look = Table(dict(zip(NAMES, alone, strict=True)), dict(zip(places, pairs, strict=True)))
    gone: list[str] = []
    for _ in NAMES:
        rest = [name for name in NAMES if name not in gone]
        gone.append(min(rest, key=lambda n: (look.among([*gone, n]), -NAMES.index(n))))
    look.tried.clear()
    steps = look_ahead(look, NAMES, count=4, trials=64)
    assert steps is not None
    assert [name for name, _ in steps] == gone
    assert sum(more for _, more in steps) == pytest.approx(look.among(NAMES))


def test_blocks_that_cannot_be_next_are_not_tried() -> None:
    look = Table({"a": 1.0, "b": 2.0, "c": 50.0, "d": 60.0})
    look_ahead(look, NAMES, count=2, trials=64)
    assert [gone for gone in look.tried if len(gone) > 1] == [("a", "b")]


def test_no_more_sets_are_tried_than_allowed_but_for_each_block_alone() -> None:
    for trials, tried in ((1, 4), (4, 4), (5, 5), (6, 6)):
        look = Table(dict.fromkeys(NAMES, 1.0), {("a", "b"): 1.0, ("c", "d"): 1.0})
        steps = look_ahead(look, NAMES, count=4, trials=trials)
        assert steps is not None
        assert (len(steps), len(look.tried)) == (4, tried)


def test_what_cannot_be_tried_alone_leaves_the_price_to_others() -> None:
    assert look_ahead(Table({"a": nan, "b": 1.0}), ["a", "b"], count=1, trials=9) is None


def test_what_cannot_be_tried_together_keeps_its_own_price() -> None:
    look = Table({"a": 1.0, "b": 2.0}, {("a", "b"): nan})
    assert look_ahead(look, ["a", "b"], count=2, trials=9) == [("a", 1.0), ("b", 2.0)]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_prices_rise_with_the_turn_and_are_never_below_what_is_added(added: list[float]) -> None:
    steps = [(f"{i}", more) for i, more in enumerate(added)]
    prices = rising(steps)
    assert list(prices) == [name for name, _ in steps]
    assert all(a < b for a, b in pairwise(prices.values()))
    assert all(prices[name] >= more for name, more in steps)


class Copies(nn.Module):
    """Write the larger of two channels into the first of them, or a bend into another."""

    def __init__(self, read: int, write: int, share: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 1, bias=False), nn.Linear(1, 6, bias=False)
        self.up.weight.data, self.down.weight.data = torch.zeros(1, 6), torch.zeros(6, 1)
        self.up.weight.data[0, read], self.down.weight.data[write] = 1.0, share
        if share == 1.0:
            self.up.weight.data[0, write] = -1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Twice(nn.Module):
    """The first and the last block do the same: what one has done, the other need not do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.stem.weight.data = torch.eye(6, 4)
        self.head.weight.data = torch.eye(6)[3:]
        self.blocks = nn.ModuleList(
            [Copies(0, 4, 1.0), Copies(1, 5, 0.4), Copies(0, 4, 1.0), Copies(2, 5, 3.0)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def chosen(**criterion: object) -> set[str]:
    torch.manual_seed(0)
    rule = otp.Layers(drop=2, criterion={"kind": "transport", **criterion})
    model, x = Twice().double().eval(), torch.randn(256, 4, dtype=torch.float64)
    with otp.attach(model, otp.Policy(rules=[rule])) as attached:
        model(x)
        plan = attached.plan()
    return {drop.block for drop in plan.drops}


def test_a_plan_looks_ahead_and_keeps_one_of_two_blocks_that_do_the_same() -> None:
    assert chosen() in ({"blocks.0", "blocks.1"}, {"blocks.1", "blocks.2"})


def test_prices_of_single_blocks_let_both_go() -> None:
    assert chosen(trials=1) == {"blocks.0", "blocks.2"}
