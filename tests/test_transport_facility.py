"""Claims about facility location: guarantees, bounds, nesting, and speed."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune.errors import TransportError
from torch_otprune.transport import facility_location, improve, lower_bound

D = torch.float64


def problem(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Costs as the flagship makes them: from second moments of correlated units."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(max(2, n // 3), n, generator=g, dtype=D)
    hidden = (torch.randn(4 * n, len(mix), generator=g, dtype=D) @ mix).relu()
    gram = hidden.T @ hidden / len(hidden)
    share = torch.rand(n, generator=g, dtype=D)
    own = gram.diagonal()
    cost = share[:, None] * (own[:, None] - gram.square() / own).clamp(min=0)
    return cost.fill_diagonal_(0), share * own


def value(cost: Tensor, null: Tensor, keep: Tensor) -> float:
    return float(torch.cat([cost[:, keep], null[:, None]], dim=1).amin(1).sum())


def best(cost: Tensor, null: Tensor, k: int) -> float:
    sets = itertools.combinations(range(cost.shape[1]), k)
    return min(value(cost, null, torch.tensor(s, dtype=torch.long)) for s in sets)


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_the_cost_of_the_nested_sets(seed: int) -> None:
    cost, null = problem(30, seed)
    found = facility_location(cost, null)
    assert sorted(found.order.tolist()) == list(range(30))
    want = [value(cost, null, found.order[:k]) for k in range(31)]
    torch.testing.assert_close(found.curve, torch.tensor(want, dtype=D), atol=1e-9, rtol=1e-9)
    assert float(found.curve[0]) == pytest.approx(float(null.sum()))
    assert float(found.curve[-1]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_every_step_takes_the_candidate_that_saves_most(seed: int) -> None:
    cost, null = problem(40, seed)
    order = facility_location(cost, null).order
    nearest = null
    for pick in order[:30]:
        gain = (nearest[:, None] - cost).clamp(min=0).sum(0)
        assert float(gain[pick]) == pytest.approx(float(gain.max()), rel=1e-9, abs=1e-12)
        nearest = torch.minimum(nearest, cost[:, pick])


@given(seed=st.integers(0, 1000))
def test_greedy_keeps_its_guarantee_and_bounds_hold(seed: int) -> None:
    cost, null = problem(9, seed)
    found = facility_location(cost, null, sizes=range(1, 9), duals=30)
    for k in range(1, 9):
        least = best(cost, null, k)
        saved, possible = float(null.sum()) - float(found.curve[k]), float(null.sum()) - least
        assert saved >= (1 - 1 / 2.7182818) * possible - 1e-9
        assert float(found.bound[k]) <= least + 1e-9
        assert 0 <= found.gap(k) <= 1


@pytest.mark.parametrize("seed", range(6))
def test_swaps_never_hurt_and_nearly_always_reach_the_best_set(seed: int) -> None:
    cost, null = problem(12, seed)
    plain = facility_location(cost, null)
    swapped = facility_location(cost, null, sizes=[3, 5], swaps=30)
    for k in (3, 5):
        assert float(swapped.curve[k]) <= float(plain.curve[k]) + 1e-12
        assert value(cost, null, swapped.keep(k)) == pytest.approx(float(swapped.curve[k]))
        assert float(swapped.curve[k]) <= 1.05 * best(cost, null, k)


def test_swaps_mend_a_bad_start() -> None:
    cost, null = problem(20, 0)
    bad = facility_location(cost, null).order[-4:]
    keep, cost_after = improve(cost, null, bad, rounds=50)
    assert cost_after < value(cost, null, bad)
    assert cost_after <= 1.05 * best(cost, null, 4)
    assert len(set(keep.tolist())) == 4


def test_dual_ascent_proves_a_gap_of_a_few_percent() -> None:
    cost, null = problem(60, 1)
    found = facility_location(cost, null, sizes=30, swaps=20, duals=200)
    assert found.gap(30) < 0.05
    bound = lower_bound(cost, null, found.keep(30), rounds=200)
    assert bound == pytest.approx(float(found.bound[30]))


def test_without_a_null_the_first_choice_is_the_median() -> None:
    x = torch.randn(15, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    cost = torch.cdist(x, x)
    found = facility_location(cost)
    assert int(found.order[0]) == int(cost.sum(0).argmin())
    assert float(found.curve[0]) == pytest.approx(float(cost.amax(1).sum()))


def test_ties_go_to_the_lowest_index() -> None:
    found = facility_location(torch.ones(6, 6).fill_diagonal_(0), torch.full((6,), 2.0))
    assert found.order.tolist() == [0, 1, 2, 3, 4, 5]


def test_relabelling_the_units_relabels_the_order() -> None:
    cost, null = problem(25, 3)
    way = torch.randperm(25)
    one, two = facility_location(cost, null), facility_location(cost[way][:, way], null[way])
    torch.testing.assert_close(way[two.order], one.order)


def test_an_infinite_cost_forbids_a_move() -> None:
    cost = torch.tensor([[0.0, torch.inf, 1.0], [torch.inf, 0.0, 1.0], [1.0, 1.0, 0.0]])
    found = facility_location(cost, torch.full((3,), 5.0), sizes=1)
    assert found.order.tolist() == [2]


def test_a_curve_of_2048_units_takes_under_four_seconds() -> None:
    cost, null = problem(2048, 0)
    start = time.process_time()
    facility_location(cost, null)
    assert time.process_time() - start < 4


def test_a_cost_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(TransportError, match="a cost is not a number"):
        facility_location(torch.full((2, 2), float("nan")))


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(TransportError, match="a cost is negative"):
        facility_location(-torch.ones(2, 2), torch.ones(2))


def test_an_infinite_null_is_refused() -> None:
    with pytest.raises(TransportError, match="moving to nothing is infinite"):
        facility_location(torch.ones(2, 2), torch.full((2,), torch.inf))


def test_a_set_larger_than_the_candidates_is_refused() -> None:
    with pytest.raises(TransportError, match="a set of 3 is asked of 2 candidates"):
        facility_location(torch.ones(2, 2), sizes=3)


def test_an_empty_cost_is_refused() -> None:
    with pytest.raises(TransportError, match="moves nothing"):
        facility_location(torch.zeros(0, 4))
