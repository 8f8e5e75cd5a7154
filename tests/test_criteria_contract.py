"""What every criterion promises on every kind of group, and the exact answers of each."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torch_otprune  # noqa: F401  fills the tables
from tests.cases import CASES
from torch_otprune.criteria import Criterion
from torch_otprune.criteria.transport import ground_cost
from torch_otprune.errors import CalibrationError
from torch_otprune.policy.registry import CRITERIA
from torch_otprune.statistics import (
    Consumer,
    Evidence,
    Recorder,
    consumers,
    gather,
    hear,
    sense,
    tangents,
)
from torch_otprune.statistics.tangents import Tangent
from torch_otprune.structure import evaluating, run, trace

KINDS = sorted(CRITERIA)
BLIND = ("random",)  # follows the place of a unit, by design
REFITTED = ("obs",)


@cache
def observed(name: str) -> tuple[Evidence, ...]:
    """Gather the evidence of all groups of a case that has data for its consumers."""
    model, batch = CASES[name].model(), CASES[name].batch(32)
    graph = trace(model, batch)
    paths = consumers(graph)
    recorder = Recorder(model, paths, samples=32, rows_per_column=8, seed=0)
    with evaluating(model), torch.no_grad():
        run(model, batch)
    recorder.remove()
    felt = sense(model, dict.fromkeys(paths), [batch], draws=4, seed=0)
    more: dict[str, Any] = {
        "signals": hear(model, paths, [batch]),
        "tangents": tangents(model, [batch], draws=1, seed=0),
    }
    found = [
        gather(model, graph, g, moments=recorder.moments, sensitivity=felt, seed=0, **more)
        for g in graph.groups
    ]
    return tuple(e for e in found if any(c.second is not None for c in e.consumers))


def every() -> list[Any]:
    """List the groups of all cases."""
    return [
        pytest.param(e, id=f"{name}-{e.name}") for name in sorted(CASES) for e in observed(name)
    ]


def criterion(kind: str) -> Criterion:
    """Build one with its defaults."""
    made = CRITERIA.resolve(kind)
    assert isinstance(made, Criterion)
    return made


def permuted(e: Evidence, order: Tensor) -> Evidence:
    """Rename the units."""
    return replace(
        e,
        producers=e.producers[order],
        scales=None if e.scales is None else e.scales[order],
        taylor=None if e.taylor is None else e.taylor[order],
        tangent=e.tangent and Tangent(e.tangent.raw[order], e.tangent.free[order]),
        filters=tuple(
            replace(f, weight=f.weight[order], offset=f.offset[order]) for f in e.filters
        ),
        consumers=tuple(
            replace(
                c,
                weight=c.weight[:, order],
                second=None if c.second is None else c.second[order][:, :, order],
                mean=None if c.mean is None else c.mean[order],
                signals=None if c.signals is None else c.signals[:, order],
            )
            for c in e.consumers
        ),
    )


def rescaled(e: Evidence, scale: Tensor) -> Evidence:
    """Multiply every unit by its own scale and divide what reads it."""
    s = scale[:, None, None, None] * scale[None, None, :, None]
    return replace(
        e,
        consumers=tuple(
            replace(
                c,
                weight=c.weight / scale[:, None],
                second=None if c.second is None else c.second * s,
            )
            for c in e.consumers
        ),
    )


def louder(e: Evidence, factor: float) -> Evidence:
    """Multiply all signals by one factor."""
    return replace(
        e,
        producers=e.producers * factor,
        scales=None if e.scales is None else e.scales * factor,
        taylor=None if e.taylor is None else e.taylor * factor**2,
        filters=tuple(
            replace(f, weight=f.weight * factor, offset=f.offset * factor) for f in e.filters
        ),
        consumers=tuple(
            replace(c, second=None if c.second is None else c.second * factor**2)
            for c in e.consumers
        ),
    )


@pytest.mark.parametrize("evidence", every())
@pytest.mark.parametrize("kind", KINDS)
def test_a_ranking_is_complete_finite_and_falls(kind: str, evidence: Evidence) -> None:
    ranking = criterion(kind).rank(evidence)
    assert ranking.order.sort().values.tolist() == list(range(evidence.units))
    assert len(ranking.curve) == evidence.units + 1
    assert ranking.curve.dtype == torch.float64
    assert bool(torch.isfinite(ranking.curve).all()) and bool((ranking.curve >= 0).all())
    assert bool((ranking.curve.diff() <= 1e-9 * ranking.curve[0].clamp_min(1e-12)).all())
    assert ranking.curve[-1] == 0


@pytest.mark.parametrize("evidence", every())
@pytest.mark.parametrize("kind", KINDS)
def test_a_ranking_is_the_same_every_time(kind: str, evidence: Evidence) -> None:
    state = torch.get_rng_state()
    one, two = criterion(kind).rank(evidence), criterion(kind).rank(evidence)
    assert torch.equal(one.order, two.order) and torch.equal(one.curve, two.curve)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("evidence", every())
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in BLIND])
def test_scores_follow_their_units(kind: str, evidence: Evidence) -> None:
    order = torch.randperm(evidence.units, generator=torch.Generator().manual_seed(0))
    one = criterion(kind).rank(evidence)
    two = criterion(kind).rank(permuted(evidence, order))
    torch.testing.assert_close(one.curve, two.curve, rtol=1e-6, atol=1e-9 * float(one.curve[0]))
    assert torch.equal(order[two.order], one.order)


@pytest.mark.parametrize("evidence", every())
@pytest.mark.parametrize("kind", KINDS)
def test_a_refined_set_has_the_same_size_and_no_unit_twice(kind: str, evidence: Evidence) -> None:
    rule = criterion(kind)
    order = rule.rank(evidence).order
    for size in range(1, evidence.units):
        found = rule.refine(evidence, order[:size])
        assert len(found) == size == len(set(found.tolist()))


@pytest.mark.parametrize("evidence", every())
@pytest.mark.parametrize("kind", KINDS)
def test_the_loudness_of_the_network_does_not_matter(kind: str, evidence: Evidence) -> None:
    one, two = (criterion(kind).rank(e) for e in (evidence, louder(evidence, 4.0)))
    assert torch.equal(one.order, two.order)


@pytest.mark.parametrize("evidence", every())
def test_transport_does_not_care_how_a_unit_is_scaled(evidence: Evidence) -> None:
    scale = torch.logspace(-1, 1, evidence.units, dtype=torch.float64)
    one, two = (criterion("transport").rank(e) for e in (evidence, rescaled(evidence, scale)))
    torch.testing.assert_close(one.curve, two.curve, rtol=1e-6, atol=1e-8 * float(one.curve[0]))


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("kind", ["transport", "obs"])
def test_costs_grow_with_the_square_of_the_signal(kind: str, factor: float) -> None:
    evidence = observed("plain")[1]
    one, two = (criterion(kind).rank(e) for e in (evidence, louder(evidence, factor)))
    torch.testing.assert_close(two.curve, one.curve * factor**2)


@pytest.mark.parametrize("evidence", every())
def test_greedy_and_swaps_never_do_worse_than_greedy(evidence: Evidence) -> None:
    cost, null = ground_cost(evidence)
    rule = criterion("transport")
    order = rule.rank(evidence).order
    for size in range(1, evidence.units):
        nested, refined = order[:size], rule.refine(evidence, order[:size])
        totals = [torch.minimum(cost[:, s].amin(1), null).sum() for s in (nested, refined)]
        assert totals[1] <= totals[0] * (1 + 1e-12)


@pytest.mark.parametrize("kind", [k for k in KINDS if criterion(k).needs])
def test_a_criterion_without_its_data_says_so(kind: str) -> None:
    bare = observed("plain")[0]
    bare = replace(
        bare,
        taylor=None,
        tangent=None,
        consumers=tuple(replace(c, second=None, signals=None) for c in bare.consumers),
    )
    with pytest.raises(CalibrationError) as error:
        criterion(kind).rank(bare)
    assert "gathered" in error.value.problem and kind in error.value.where


@pytest.mark.parametrize("kind", ["magnitude", "fpgm", "bn_scale", "activation", "taylor"])
def test_a_score_that_is_not_finite_is_refused(kind: str) -> None:
    bad = observed("plain")[0]
    nan = torch.full((), float("nan"), dtype=torch.float64)
    bad = louder(bad, float(nan))
    with pytest.raises(CalibrationError) as error:
        criterion(kind).rank(bad)
    assert error.value.problem == "unit 0 scored nan." and bad.name in error.value.where


# exact answers


def evidence(signals: Tensor, weight: Tensor, producers: Tensor | None = None) -> Evidence:
    """Lay out one dense consumer without a bias: samples x units, out x units."""
    second = (signals.T @ signals / len(signals))[:, None, :, None]
    feel = torch.ones(len(weight), dtype=torch.float64)
    reader = Consumer("next", weight[:, :, None], second, False, feel)
    made = weight.T if producers is None else producers
    return Evidence("group", signals.shape[1], made, None, (reader,), None, 0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dropping_everything_costs_what_the_units_write() -> None:
    h, w = draw(40, 5), draw(3, 5, seed=1)
    curve = criterion("transport").rank(evidence(h, w)).curve
    alone = sum(float((h[:, [i]] @ w[:, [i]].T).square().sum(1).mean()) for i in range(5))
    assert float(curve[0]) == pytest.approx(alone)


@given(scale=st.floats(-5, 5).filter(lambda s: abs(s) > 0.1))
def test_a_scaled_copy_can_go_for_nothing(scale: float) -> None:
    h = draw(40, 4)
    h = torch.cat([h, scale * h[:, :1]], dim=1)
    for kind in ("transport", "obs"):
        curve = criterion(kind).rank(evidence(h, draw(3, 5, seed=1))).curve
        assert float(curve[4]) < 1e-3 * float(curve[0])
    exact = criterion("transport").rank(evidence(h, draw(3, 5, seed=1))).curve
    assert float(exact[4]) < 1e-8 * float(exact[0])


def test_the_ground_cost_is_the_error_with_the_best_scale() -> None:
    h, w = draw(60, 4), draw(3, 4, seed=1)
    cost, null = ground_cost(evidence(h, w))
    for i in range(4):
        assert float(null[i]) == pytest.approx(_power(h[:, i], w[:, i]), rel=1e-6)
        for j in range(4):
            s = (h[:, i] @ h[:, j]) / h[:, j].square().sum()
            expected = _power(h[:, i] - s * h[:, j], w[:, i])
            assert float(cost[i, j]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def _power(signal: Tensor, weight: Tensor) -> float:
    return float(signal.square().mean() * weight.square().sum())


def test_obs_prices_what_least_squares_leaves() -> None:
    h = draw(80, 6) @ draw(6, 6, seed=2)
    w = draw(3, 6, seed=1)
    ranking = CRITERIA.resolve({"kind": "obs", "ridge": 1e-9}).rank(evidence(h, w))  # type: ignore[attr-defined]
    for size in range(1, 6):
        kept = h[:, ranking.order[:size]]
        fit = torch.linalg.lstsq(kept, h @ w.T).solution
        left = (h @ w.T - kept @ fit).square().sum(1).mean()
        assert float(ranking.curve[size]) == pytest.approx(float(left), rel=1e-5)


def test_obs_finds_the_best_unit_to_drop() -> None:
    h = draw(80, 5) @ draw(5, 5, seed=2)
    w = draw(3, 5, seed=1)
    ranking = CRITERIA.resolve({"kind": "obs", "ridge": 1e-9}).rank(evidence(h, w))  # type: ignore[attr-defined]
    left = []
    for gone in range(5):
        kept = h[:, [i for i in range(5) if i != gone]]
        fit = torch.linalg.lstsq(kept, h @ w.T).solution
        left.append(float((h @ w.T - kept @ fit).square().sum()))
    assert int(ranking.order[-1]) == min(range(5), key=left.__getitem__)


def test_what_the_output_does_not_feel_costs_nothing() -> None:
    plain = evidence(draw(40, 4), draw(3, 4, seed=1))
    deaf = replace(
        plain, consumers=(replace(plain.consumers[0], feel=torch.zeros(3, dtype=torch.float64)),)
    )
    for kind in ("transport", "obs"):
        assert float(criterion(kind).rank(deaf).curve.max()) == 0


def test_two_consumers_add_their_costs() -> None:
    one = evidence(draw(40, 4), draw(3, 4, seed=1))
    both = replace(one, consumers=one.consumers * 2)
    for kind in ("transport", "obs"):
        torch.testing.assert_close(
            criterion(kind).rank(both).curve, 2 * criterion(kind).rank(one).curve
        )


def test_magnitude_is_the_norm_of_the_producing_row() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]], dtype=torch.float64)
    made = evidence(draw(9, 3), draw(2, 3), rows)
    assert criterion("magnitude").rank(made).order.tolist() == [2, 0, 1]


def test_fpgm_drops_the_filter_in_the_middle() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.1]], dtype=torch.float64)
    made = evidence(draw(9, 3), draw(2, 3), rows)
    assert criterion("fpgm").rank(made).order.tolist() == [2, 0, 1]


def test_bn_scale_averages_the_absolute_scales() -> None:
    scales = torch.tensor([[1.0, -3.0], [1.5, 1.5], [0.0, 5.0]], dtype=torch.float64)
    made = replace(evidence(draw(9, 3), draw(2, 3)), scales=scales)
    assert criterion("bn_scale").rank(made).order.tolist() == [2, 0, 1]


def test_activation_is_the_root_mean_square_of_a_signal() -> None:
    h = torch.ones(4, 3, dtype=torch.float64) * torch.tensor([1.0, 3.0, 2.0])
    assert criterion("activation").rank(evidence(h, draw(2, 3))).order.tolist() == [1, 2, 0]


def test_chance_depends_on_the_seed_and_the_group() -> None:
    made = evidence(draw(9, 12), draw(2, 12))
    orders = [
        criterion("random").rank(e).order.tolist()
        for e in (made, replace(made, seed=1), replace(made, name="other"))
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_taylor_is_activation_times_gradient() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    model, x = model.double(), draw(20, 3)
    graph = trace(model, x)
    felt = sense(model, {"2": None}, [x], draws=3, seed=0)
    made = gather(model, graph, graph.groups[0], moments={}, sensitivity=felt, seed=0)
    with torch.no_grad():
        expected = (model[:2](x) * model[2].weight).square().mean(0)
    torch.testing.assert_close(made.taylor, expected)


def test_dead_units_go_first() -> None:
    h = draw(40, 4)
    h[:, 2] = 0
    for kind in ("transport", "activation", "obs"):
        assert int(criterion(kind).rank(evidence(h, draw(3, 4, seed=1))).order[-1]) == 2


def test_all_units_dead_is_no_crash() -> None:
    silent = evidence(torch.zeros(9, 4, dtype=torch.float64), draw(3, 4, seed=1))
    for kind in ("transport", "activation", "obs", "magnitude"):
        ranking = criterion(kind).rank(silent)
        assert sorted(ranking.order.tolist()) == [0, 1, 2, 3]
        assert bool(torch.isfinite(ranking.curve).all())
