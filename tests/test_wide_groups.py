"""Very wide groups: candidates instead of all pairs, and the same answer where both can be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from benchmarks import wide_groups
from torch_otprune.criteria import SlicedKernel, Transport
from torch_otprune.criteria.base import Ranking
from torch_otprune.criteria.transport import ground_cost
from torch_otprune.criteria.wide import candidate_costs
from torch_otprune.errors import CalibrationError, TransportError
from torch_otprune.plan.price import dropped
from torch_otprune.statistics import Consumer, Evidence
from torch_otprune.transport import facility_location, facility_location_sparse, nearest


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    near = distance.topk(count, dim=1, largest=False)
    return near.indices, near.values


def recall(found: Tensor, true: Tensor) -> float:
    return float((found[:, :, None] == true[:, None]).any(2).double().mean())


def evidence(*, rows: int = 40, units: int = 30, absorbs: bool = True, wide: bool) -> Evidence:
    """Lay out one dense consumer by its moments, or by the rows that they were made of."""
    h = draw(rows, 5).exp() @ draw(5, units, seed=1)
    weight, feel = draw(4, units, 1, seed=2), draw(4, seed=3).exp()
    centred = h - h.mean(0) if absorbs else h
    second = (centred.T @ centred / rows)[:, None, :, None]
    known = None if wide else second
    reader = Consumer("next", weight, known, absorbs, feel, h.mean(0)[:, None], h)
    return Evidence("group", units, weight[:, :, 0].T, None, (reader,), None, 0)


# neighbours


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_all_pairs_are_those_of_brute_force(offset: float) -> None:
    points = draw(200, 6) + offset
    found = nearest(points, 5, method="exact")
    true, far = brute_force(points, 5)
    assert found.exact and torch.equal(found.index, true)
    torch.testing.assert_close(found.distance, far)


@pytest.mark.parametrize("method", ["exact", "trees"])
@given(n=st.integers(2, 40), d=st.integers(1, 12), count=st.integers(1, 50), seed=st.integers(0, 5))
def test_neighbours_are_others_at_their_true_distance_in_order(
    method: Any, n: int, d: int, count: int, seed: int
) -> None:
    points = draw(n, d, seed=seed)
    found = nearest(points, count, method=method, seed=seed)
    few = min(count, n - 1)
    assert found.index.shape == found.distance.shape == (n, few)
    assert bool((found.index != torch.arange(n)[:, None]).all())
    assert all(len(set(row)) == few for row in found.index.tolist())
    true = (points[:, None] - points[found.index]).norm(dim=2)
    torch.testing.assert_close(found.distance, true)
    assert bool((found.distance.diff(dim=1) >= 0).all())


def test_trees_find_nearly_all_neighbours_of_units_that_come_in_kinds() -> None:
    points = wide_groups.clustered(3000, torch.Generator().manual_seed(0))
    found, true = nearest(points, 8, method="trees"), brute_force(points, 8)[0]
    assert not found.exact and recall(found.index, true) > 0.97
    fewer = nearest(points, 8, method="trees", trees=1, rounds=0)
    assert recall(fewer.index, true) < recall(found.index, true)


def test_what_trees_find_instead_is_hardly_further_away() -> None:
    points = wide_groups.white(2000, torch.Generator().manual_seed(0))
    found, (true, far) = nearest(points, 8, method="trees"), brute_force(points, 8)
    assert 0.4 < recall(found.index, true) < 1
    assert float((found.distance / far).mean()) < 1.05


def test_the_seed_decides_and_nothing_else_is_drawn() -> None:
    points, state = draw(500, 20), torch.get_rng_state()
    one, two = (nearest(points, 4, method="trees", seed=3) for _ in range(2))
    assert torch.equal(one.index, two.index) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["exact", "trees"])
def test_points_that_coincide_are_no_crash(method: Any) -> None:
    found = nearest(torch.zeros(50, 3), 4, method=method)
    assert float(found.distance.max()) == 0 and bool(
        (found.index != torch.arange(50)[:, None]).all()
    )


@pytest.mark.parametrize("method", ["exact", "trees"])
@pytest.mark.parametrize("unit", [2.0**-80, 2.0**70])
def test_the_unit_of_points_does_not_matter(method: Any, unit: float) -> None:
    points = draw(300, 4).float()
    one, two = (nearest(points * u, 3, method=method) for u in (1.0, unit))
    assert torch.equal(one.index, two.index)
    torch.testing.assert_close(one.distance * unit, two.distance, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("points", "count", "more", "problem"),
    [
        (torch.zeros(1, 3), 2, {}, "single point"),
        (torch.zeros(4, 3), 0, {}, "count"),
        (torch.full((4, 3), float("nan")), 2, {}, "points"),
        (torch.zeros(9, 3), 2, {"trees": 0}, "trees"),
    ],
)
def test_what_has_no_neighbours_is_refused(
    points: Tensor, count: int, more: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TransportError) as error:
        nearest(points, count, **more)
    assert problem in f"{error.value.problem} {error.value.where}" and error.value.fix


# facility location on candidates


@given(seed=st.integers(0, 60), n=st.integers(2, 12))
def test_with_all_candidates_it_is_the_dense_greedy(seed: int, n: int) -> None:
    points, null = draw(n, 3, seed=seed), draw(n, seed=seed + 1).abs() + 0.5
    cost = torch.cdist(points, points).square().fill_diagonal_(0)
    every = torch.arange(n).expand(n, n)
    dense = facility_location(cost, null)
    found = facility_location_sparse(every, cost, null)
    torch.testing.assert_close(found.curve, dense.curve, rtol=1e-9, atol=1e-9)
    useful = int((dense.curve > 1e-9).sum())
    assert torch.equal(found.order[:useful], dense.order[:useful])


def test_the_curve_is_what_the_set_costs() -> None:
    points, null = draw(40, 4), draw(40, seed=1).abs()
    near = nearest(points, 6)
    cost = near.distance.square()
    found = facility_location_sparse(near.index, cost, null)
    assert sorted(found.order.tolist()) == list(range(40))
    for size in (0, 1, 7, 20, 40):
        kept = set(found.order[:size].tolist())
        total = sum(
            0.0 if i in kept else min(
                [float(null[i]), *(float(c) for j, c in zip(js, cs, strict=True) if int(j) in kept)]
            )
            for i, (js, cs) in enumerate(zip(near.index, cost, strict=True))
        )  # fmt: skip
        assert float(found.curve[size]) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize(
    ("candidates", "cost", "null", "problem"),
    [
        (torch.zeros(3, 1).long(), -torch.ones(3, 1), torch.zeros(3), "negative"),
        (torch.zeros(3, 1).long(), torch.ones(3, 1), torch.full((3,), float("inf")), "infinite"),
    ],
)
def test_impossible_costs_are_refused(
    candidates: Tensor, cost: Tensor, null: Tensor, problem: str
) -> None:
    with pytest.raises(TransportError) as error:
        facility_location_sparse(candidates, cost, null)
    assert problem in error.value.problem and error.value.fix


# transport on a wide group


@pytest.mark.parametrize("absorbs", [True, False])
def test_prices_from_rows_are_those_from_moments(absorbs: bool) -> None:
    cost, null = ground_cost(evidence(absorbs=absorbs, wide=False))
    found, few, nothing = candidate_costs(evidence(absorbs=absorbs, wide=True), 29)
    torch.testing.assert_close(nothing, null, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(few, cost.gather(1, found.index), rtol=1e-6, atol=1e-6)


def test_with_all_candidates_the_ranking_is_the_dense_one() -> None:
    dense = Transport().rank(evidence(wide=False))
    found = Transport(candidates=29).rank(evidence(wide=True))
    torch.testing.assert_close(found.curve, dense.curve, rtol=1e-6, atol=1e-6)
    assert "30 units: moves are priced onto 29 candidates each" in found.note


def test_a_scaled_copy_is_among_the_candidates() -> None:
    made = evidence(wide=True)
    h = made.consumers[0].signals
    assert h is not None
    h = torch.cat([h[:, :15], -3 * h[:, :15]], 1)
    made = replace(made, consumers=(replace(made.consumers[0], signals=h),))
    _, cost, null = candidate_costs(made, 1)
    assert bool((cost[:, 0] < 1e-9 * null).all())


@pytest.mark.parametrize("absorbs", [True, False])
def test_dropping_costs_the_same_from_rows(absorbs: bool) -> None:
    dense = Transport().rank(evidence(absorbs=absorbs, wide=False))
    one = dropped(dense, evidence(absorbs=absorbs, wide=False))
    two = dropped(dense, evidence(absorbs=absorbs, wide=True))
    torch.testing.assert_close(one.curve, two.curve, rtol=1e-8, atol=1e-8)


def network(width: int = 60) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 5)).double().eval()


def policy(repair: str = "none", **settings: Any) -> otp.Policy:
    setting = {"kind": "transport", "wide": 50, **settings}
    return otp.Policy(rules=[otp.Channels(keep="50%", criterion=setting, repair=repair)])


def test_a_wide_layer_is_planned_without_products_of_all_pairs() -> None:
    model, batches = network(), [draw(32, 6), draw(32, 6, seed=1)]
    with otp.attach(model, policy(), example=batches[0]) as attached:
        assert attached.bytes == 8 * 60 * (256 + 64 - 1)  # rows alone
        plan = otp.observe(attached, batches).plan()
    assert any("60 units: moves are priced onto 16 candidates" in note for note in plan.notes)
    assert plan.cuts[0].error is not None
    with otp.attach(model, policy(wide=100)) as attached:
        dense = otp.observe(attached, batches).plan()
    assert not any("candidates" in note for note in dense.notes)
    assert plan.cuts[0].error == pytest.approx(dense.cuts[0].error or 0, rel=0.25)
    report = otp.apply_(model, plan, batches)
    assert model[0].out_features == 30 and report.output_error.after_repair < 1


def test_batches_do_not_matter_for_a_wide_layer() -> None:
    x = draw(40, 6)
    plans = []
    for batches in ([x], [x[:7], x[7:]]):
        with otp.attach(network(), policy()) as attached:
            plans.append(otp.observe(attached, batches).plan())
    assert plans[0].keep() == plans[1].keep()


def test_a_refit_that_would_not_fit_is_refused_before_anything_is_cut() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CalibrationError) as error:
        otp.prune_(model, policy("least_squares"), [draw(32, 6)])
    assert "a refit on 60 units would take" in error.value.problem
    assert "'0'" in error.value.where and "repair='none'" in error.value.fix
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_coupling_that_would_not_fit_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    otp.prune_(network(), policy("coupling"), [draw(32, 6)])  # of so few units it fits
    monkeypatch.setattr("torch_otprune.plan.price.WIDE", 50)
    with pytest.raises(CalibrationError) as error:
        otp.prune_(model, policy("coupling"), [draw(32, 6)])
    assert "a coupling on 60 units would take" in error.value.problem
    assert model[0].out_features == 60


def test_a_plan_by_rows_of_few_samples_says_so() -> None:
    with otp.attach(network(), policy()) as attached:
        plan = otp.observe(attached, [draw(1, 6)]).plan()
    assert any("only 1 calibration samples were seen" in note for note in plan.notes)


@pytest.mark.parametrize("units", [40, 700])  # within a block, and over several
@pytest.mark.parametrize("absorbs", [True, False])
def test_what_dropping_costs_is_that_of_adding_up_one_by_one(units: int, absorbs: bool) -> None:
    made = evidence(units=units, absorbs=absorbs, wide=True)
    order, reader = torch.randperm(units), made.consumers[0]
    assert reader.signals is not None
    rows = reader.signals - reader.signals.mean(0) if absorbs else reader.signals
    written = rows[:, :, None] * reader.felt()[:, :, 0].T
    tails = written[:, order].flip(1).cumsum(1).square().sum(2).mean(0).flip(0)
    found = dropped(Ranking(order, torch.zeros(units + 1)), made).curve
    torch.testing.assert_close(found, torch.cat([tails, tails.new_zeros(1)]))


def test_a_criterion_that_needs_all_pairs_says_so() -> None:
    rules = [
        otp.Channels(targets="0", keep="50%", criterion="obs", repair="none"),
        otp.Channels(targets="2", keep="50%", criterion={"kind": "transport", "wide": 50}),
    ]
    model = nn.Sequential(*network(), nn.ReLU(), nn.Linear(5, 3).double())
    with (
        pytest.raises(CalibrationError) as error,
        otp.attach(model, otp.Policy(rules=rules)) as attached,
    ):
        otp.observe(attached, [draw(32, 6)]).plan()
    assert "60 units are too many" in error.value.problem and "obs" in error.value.where


def test_a_unit_that_is_not_finite_is_named() -> None:
    made = evidence(wide=True)
    h = made.consumers[0].signals
    assert h is not None
    h[3, 7] = float("inf")
    with pytest.raises(CalibrationError) as error:
        Transport().rank(made)
    assert error.value.problem.startswith("unit 7 scored")


def test_dead_units_of_a_wide_group_go_first() -> None:
    made = evidence(wide=True)
    h = made.consumers[0].signals
    assert h is not None
    h[:, [2, 9]] = 0
    assert set(Transport().rank(made).order.tolist()[-2:]) == {2, 9}


class Memory(nn.Module):
    """Keys and values as bare parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(draw(size, 6))
        self.values = nn.Parameter(draw(size, 5, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.keys.T).relu() @ self.values


def test_a_wide_memory_is_ranked_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_otprune.statistics.evidence.WIDE", 50)
    model, setting = Memory(60), {"kind": "sliced_kernel", "measure": "weights"}
    rule = otp.Channels(keep="50%", criterion=setting, repair="none")
    with otp.attach(model, otp.Policy(rules=[rule])) as attached:
        plan = otp.observe(attached, [draw(8, 6)]).plan()
    assert plan.cuts[0].error is None and "unknown" in plan.cuts[0].reason
    otp.apply_(model, plan, [draw(8, 6)])
    assert model.keys.shape == (30, 6) and model.values.shape == (30, 5)


def test_experts_are_a_diverse_subset_as_well() -> None:
    torch.manual_seed(0)
    rows = draw(6, 8)
    rows[3:] = rows[:3] * 1.001  # three kinds, two of each
    made = Evidence("moe", 6, rows, None, (), None, 0)
    order = otp.Channels(criterion={"kind": "sliced_kernel", "measure": "weights"}).criterion
    assert isinstance(order, SlicedKernel)
    assert {unit % 3 for unit in order.rank(made).order[:3].tolist()} == {0, 1, 2}


# the benchmark


def test_the_benchmark_runs_and_says_where(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(wide_groups, "ASKED", 50)
    out = tmp_path / "wide.json"
    found = wide_groups.main(["--quick", "--out", str(out)])
    assert json.loads(out.read_text())["environment"] and found["quick"]
    assert {row["kind"] for row in found["search"]} == set(wide_groups.KINDS)
    assert all(0 <= row["recall"] <= 1 and row["further"] > -1e-4 for row in found["search"])
    names = [row["criterion"] for row in found["plans"]]
    assert names == ["transport", "sliced_kernel", "magnitude"]
    assert any("candidates each" in note for note in found["plans"][0]["notes"])
