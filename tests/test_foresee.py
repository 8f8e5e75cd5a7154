"""Prices that foresee later refits: exact factors, and what they change in a plan."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.criteria.base import Ranking
from torch_otprune.errors import PolicyError
from torch_otprune.plan.price import foreseen, repaired
from torch_otprune.statistics import Consumer, Evidence


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evidence(*paths: str) -> Evidence:
    readers = []
    for number, path in enumerate(paths):
        x = draw(50, 6, seed=number)
        second = (x.T @ x / 50)[:, None, :, None]
        weight, feel = draw(3, 6, 1, seed=9 + number), torch.ones(3, dtype=torch.float64)
        readers.append(Consumer(path, weight, second, False, feel))
    return Evidence("g", 6, draw(6, 4), None, tuple(readers), None, 0)


ORDER = list("abcdefghijkl")


@pytest.mark.parametrize(
    ("path", "share"), [("l", 1), ("k", 1), ("j", 2), ("f", 6), ("d", 8), ("c", 8), ("a", 8)]
)
def test_a_price_is_shared_among_the_layers_behind_up_to_eight(path: str, share: int) -> None:
    made, ranking = evidence(path), Ranking(torch.arange(6), torch.zeros(7))
    one, two = (repaired(ranking, e).curve for e in (made, foreseen(made, ORDER)))
    torch.testing.assert_close(two * share, one)


def test_each_consumer_of_a_stream_is_weighed_by_its_own_place() -> None:
    both, ranking = evidence("a", "l"), Ranking(torch.arange(6), torch.zeros(7))
    apart = [replace(both, consumers=(reader,)) for reader in both.consumers]
    early, late = (repaired(ranking, e).curve for e in apart)
    torch.testing.assert_close(repaired(ranking, foreseen(both, ORDER)).curve, early / 8 + late)


def test_a_consumer_that_is_no_layer_keeps_its_price() -> None:
    made, ranking = evidence("loose"), Ranking(torch.arange(6), torch.zeros(7))
    one, two = (repaired(ranking, e).curve for e in (made, foreseen(made, ORDER)))
    torch.testing.assert_close(one, two)


def chain() -> nn.Module:
    """Six linear layers of one width."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 12)]
    for _ in range(5):
        layers += [nn.ReLU(), nn.Linear(12, 12)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(12, 3)).double().eval()


def plan(model: nn.Module, repair: Any, *, foresee: bool) -> dict[str, int]:
    rule = otp.Channels(repair=repair)
    policy = otp.Policy(rules=[rule], budget=otp.Budget(macs="50%", foresee=foresee))
    with otp.attach(copy.deepcopy(model), policy) as attached:
        found = otp.observe(attached, [draw(200, 6)]).plan()
    return {cut.group: len(cut.keep) for cut in found.cuts}


def test_late_layers_keep_more_where_early_ones_are_made_up_for() -> None:
    model = chain()
    before, after = (plan(model, "least_squares", foresee=f) for f in (False, True))
    last = max(before, key=int)
    assert after.get(last, 12) > before[last]


@pytest.mark.parametrize("repair", ["none", "norm", "bias"])
def test_without_a_refit_there_is_nothing_to_foresee(repair: str) -> None:
    model = chain()
    assert plan(model, repair, foresee=True) == plan(model, repair, foresee=False)


def test_rules_about_layers_are_not_mixed_with_it() -> None:
    with pytest.raises(PolicyError) as error:
        otp.Policy(
            rules=[otp.Channels(), otp.Layers(drop=1)],
            budget=otp.Budget(macs="50%", foresee=True),
        )
    assert error.value.problem == (
        "budget.foresee changes the prices of widths, and a rule about layers shares them."
    )
    assert error.value.fix == "leave foresee out, or cut layers by a policy of their own."


def test_a_policy_that_foresees_survives_yaml() -> None:
    policy = otp.Policy(rules=[otp.Channels()], budget=otp.Budget(macs="50%", foresee=True))
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy


def test_the_benchmark_of_prices_runs(tmp_path: Path) -> None:
    from benchmarks import methods_prices
    from benchmarks.common import read_json

    methods_prices.main(["--quick", "--out", str(tmp_path / "prices.json")])
    rows = read_json(tmp_path / "prices.json")["rows"]
    assert {row["group"] for row in rows} <= {f"layer{i}.0.conv1" for i in (1, 2, 3)} | {"conv1"}
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in rows)
    text = (tmp_path / "prices.md").read_text()
    assert text.count("\n") == len(rows) + 2
