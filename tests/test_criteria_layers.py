"""What every layer criterion promises on every chain, and the exact answers of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from torch_otprune.criteria.layers import (
    LayerCriterion,
    LossDelta,
    MaxSliced,
    SiteCriterion,
    Stein,
    Transport,
)
from torch_otprune.criteria.layers.normal import rectified, relu6, share_off
from torch_otprune.criteria.layers.runs import greedy, priced_runs, runs
from torch_otprune.criteria.layers.sites import entropy_bits
from torch_otprune.criteria.layers.spans import RIDGES, ridge_regression, span_costs
from torch_otprune.errors import CalibrationError, PolicyError
from torch_otprune.policy.registry import LAYER_CRITERIA
from torch_otprune.statistics.depth import ChainEvidence, SiteEvidence, SiteFold

KINDS = sorted(LAYER_CRITERIA)
STREAM = ("angular", "block_influence", "gaussian", "lacoot", "max_sliced", "transport")
SITES = ("easier", "entropy", "space_folds", "stein", "tlc")
SEARCHED = ("lacoot", "max_sliced")  # random directions meet the channels in their order
RELATIVE = ("angular", "block_influence", "gaussian", "max_sliced")


def criterion(kind: str, **settings: object) -> LayerCriterion:
    """Build one."""
    made = LAYER_CRITERIA.resolve({"kind": kind, **settings})
    assert isinstance(made, LayerCriterion)
    return made


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(*values: float) -> Tensor:
    """Write out a vector."""
    return torch.tensor(values, dtype=torch.float64)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
}


def site(z: Tensor, function: str = "relu", **known: Any) -> SiteEvidence:
    """Pool the sums of an activation: observations x channels."""
    phi = ACTIVATIONS[function](z)
    fold = SiteFold(0.5, 0.2, 0.1, 0.6, 0.3, 0.05, paths=8)
    settings: dict[str, Any] = {"norm": None, "reads": None, "magnitude": None, "fold": fold}
    settings |= known
    return SiteEvidence(
        name="act",
        function=function,
        count=len(z),
        positive=(z > 0).double().mean(0),
        nonnegative=(z >= 0).double().mean(0),
        capped=(z >= 6).double().mean(0),
        mean=z.mean(0),
        var=z.var(0, correction=0),
        out_mean=phi.mean(0),
        out_var=phi.var(0, correction=0),
        cov=((z - z.mean(0)) * (phi - phi.mean(0))).mean(0),
        **settings,
    )


def chain(points: Tensor, **known: Any) -> ChainEvidence:
    """Lay out a chain whose rows are one sample each: points x rows x channels."""
    blocks, rows = len(points) - 1, points.shape[1]
    settings: dict[str, Any] = {
        "sample": torch.arange(rows),
        "last": torch.ones(rows, dtype=torch.bool),
        "writers": (None,) * blocks,
        "feel": torch.ones(len(points), points.shape[2], dtype=torch.float64),
        "power": 1.0,
        "sites": tuple((site(draw(50, 3, seed=b) + b / 4),) for b in range(blocks)),
        "weights": torch.arange(1, blocks + 1, dtype=torch.float64) / 100,
        "trial": lambda gone: sum(2.0**b for b in gone) / 100,
        "seed": 0,
        **known,
    }
    names = tuple(f"blocks.{b}" for b in range(blocks))
    return ChainEvidence(name=names[0], blocks=names, points=points, **settings)


def walk(blocks: int = 5, rows: int = 48, channels: int = 6) -> Tensor:
    """Let a stream take steps of different lengths."""
    steps = draw(blocks, rows, channels, seed=1) * torch.linspace(0.2, 1.0, blocks).view(-1, 1, 1)
    return torch.cat([draw(1, rows, channels), steps]).cumsum(0)


def written(blocks: int = 5, rows: int = 48, channels: int = 6) -> ChainEvidence:
    """Lay out a chain whose first block has no layer in front, while the others have one."""
    writers = (None, *(draw(rows, 4, seed=9 + b) for b in range(blocks - 1)))
    feel = draw(blocks + 1, channels, seed=3).square()
    sample = torch.arange(rows) // 2
    last = torch.arange(rows) % 2 == 1
    return chain(
        walk(blocks, rows, channels),
        writers=writers,
        feel=feel,
        power=3.0,
        sample=sample,
        last=last,
    )


def with_rows(e: ChainEvidence, rows: Tensor) -> ChainEvidence:
    """Take rows in another order, or several times."""
    return replace(
        e,
        points=e.points[:, rows],
        sample=e.sample[rows],
        last=e.last[rows],
        writers=tuple(None if w is None else w[rows] for w in e.writers),
    )


def with_channels(e: ChainEvidence, order: Tensor) -> ChainEvidence:
    """Rename the channels of the stream."""
    return replace(e, points=e.points[..., order], feel=e.feel[:, order])


CHAINS = {"walk": chain(walk()), "written": written(), "one": chain(walk(1))}


# the contract


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_ranking_is_complete_finite_and_falls(kind: str, name: str) -> None:
    evidence = CHAINS[name]
    ranking = criterion(kind).rank(evidence)
    assert ranking.order.sort().values.tolist() == list(range(len(evidence.blocks)))
    assert len(ranking.curve) == len(evidence.blocks) + 1
    assert ranking.curve.dtype == torch.float64
    assert bool(torch.isfinite(ranking.curve).all()) and bool((ranking.curve >= 0).all())
    assert bool((ranking.curve.diff() <= 1e-12 * ranking.curve[0]).all())
    assert ranking.curve[-1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_ranking_is_the_same_every_time_and_leaves_the_generator_alone(kind: str) -> None:
    state = torch.get_rng_state()
    one, two = (criterion(kind).rank(CHAINS["written"]) for _ in range(2))
    assert torch.equal(one.order, two.order) and torch.equal(one.curve, two.curve)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_rows_does_not_matter(kind: str) -> None:
    evidence = CHAINS["written"]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    one, two = (criterion(kind).rank(e) for e in (evidence, with_rows(evidence, order)))
    assert torch.equal(one.order, two.order)
    searched = 1e-4 if kind == "max_sliced" else 1e-6  # a top may be reached along two ridges
    torch.testing.assert_close(one.curve, two.curve, rtol=searched, atol=1e-9)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in SEARCHED])
def test_the_order_of_the_channels_does_not_matter(kind: str) -> None:
    evidence = CHAINS["written"]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    one, two = (criterion(kind).rank(e) for e in (evidence, with_channels(evidence, order)))
    assert torch.equal(one.order, two.order)
    torch.testing.assert_close(one.curve, two.curve, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_there_twice_change_nothing(kind: str) -> None:
    evidence = CHAINS["written"]
    twice = with_rows(evidence, torch.arange(48).repeat(2))
    one, two = (criterion(kind).rank(e) for e in (evidence, twice))
    assert torch.equal(one.order, two.order)
    torch.testing.assert_close(one.curve, two.curve, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 7.0])
@pytest.mark.parametrize("kind", RELATIVE)
def test_a_relative_score_does_not_care_how_large_the_stream_is(kind: str, scale: float) -> None:
    evidence = CHAINS["written"]
    louder = replace(evidence, points=evidence.points * scale)
    one, two = (criterion(kind).rank(e) for e in (evidence, louder))
    searched = 1e-4 if kind == "max_sliced" else 1e-5  # a top may be reached along two ridges
    torch.testing.assert_close(one.curve, two.curve, rtol=searched, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_transport_does_not_care_in_which_unit_the_stream_is(scale: float) -> None:
    evidence = CHAINS["written"]
    louder = replace(evidence, points=evidence.points * scale, feel=evidence.feel / scale**2)
    one, two = (criterion("transport").rank(e) for e in (evidence, louder))
    torch.testing.assert_close(one.curve, two.curve, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [k for k in STREAM if k != "transport"])
def test_a_block_that_does_nothing_scores_exactly_zero(kind: str) -> None:
    points = walk(3)
    points[2] = points[1]
    ranking = criterion(kind).rank(chain(points))
    assert int(ranking.order[-1]) == 1 and float(ranking.curve[2]) == 0


@pytest.mark.parametrize("how", ["identity", "scale", "affine"])
def test_transport_asks_nothing_for_a_block_that_does_nothing(how: str) -> None:
    points = walk(3)
    points[2] = points[1]
    ranking = criterion("transport", replace=how).rank(chain(points))
    assert int(ranking.order[-1]) == 1 and float(ranking.curve[2]) == 0


@pytest.mark.parametrize("kind", STREAM)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_stream_that_is_not_finite_is_refused(kind: str, bad: float) -> None:
    points = walk()
    points[2, 3, 1] = bad
    with pytest.raises(CalibrationError) as error:
        criterion(kind).rank(chain(points))
    assert "1 of 1728 entries of the stream are NaN or infinite." in str(error.value)
    assert "chain 'blocks.0'" in str(error.value) and "calibration data" in error.value.fix


def test_a_writer_that_is_not_finite_is_refused() -> None:
    evidence = CHAINS["written"]
    broken = torch.full_like(evidence.points[0], math.nan)
    with pytest.raises(CalibrationError, match="entries of a layer's input are NaN"):
        Transport().rank(replace(evidence, writers=(broken,) * 5))


@pytest.mark.parametrize("kind", STREAM)
def test_a_chain_without_rows_is_refused(kind: str) -> None:
    empty = chain(torch.zeros(3, 0, 4, dtype=torch.float64), last=torch.ones(0, dtype=torch.bool))
    with pytest.raises(CalibrationError) as error:
        criterion(kind).rank(empty)
    told = str(error.value)
    assert "no rows of the stream" in told or "no row is the last" in told


@pytest.mark.parametrize("kind", SITES)
def test_a_block_without_activations_is_refused(kind: str) -> None:
    evidence = replace(CHAINS["walk"], sites=((),) * 5)
    with pytest.raises(CalibrationError, match=r"block 'blocks.0' has no activation to look at"):
        criterion(kind).rank(evidence)


@pytest.mark.parametrize("kind", SITES)
def test_an_activation_that_was_not_observed_is_refused(kind: str) -> None:
    blind = replace(site(draw(9, 3)), count=0)
    with pytest.raises(CalibrationError) as error:
        criterion(kind).rank(chain(walk(1), sites=((blind,),)))
    assert error.value.problem == "activation 'act' was not observed."
    assert kind in error.value.where and "calibration data" in error.value.fix


@pytest.mark.parametrize("kind", SITES)
def test_an_activation_with_nan_is_refused(kind: str) -> None:
    z = draw(9, 3)
    bad = site(z)
    nan = torch.full((3,), math.nan, dtype=torch.float64)
    bad = replace(bad, positive=nan, nonnegative=nan, mean=nan, cov=nan)
    with pytest.raises(CalibrationError, match=r"block 0 scored nan"):
        criterion(kind).rank(chain(walk(1), sites=((bad,),)))


@pytest.mark.parametrize("kind", KINDS)
def test_dead_channels_change_no_order(kind: str) -> None:
    evidence = CHAINS["walk"]
    dead = torch.zeros(6, 48, 2, dtype=torch.float64)
    wider = chain(torch.cat([evidence.points, dead], dim=2))
    one, two = (criterion(kind).rank(e) for e in (evidence, wider))
    assert bool(torch.isfinite(two.curve).all())
    if kind not in SEARCHED:
        assert torch.equal(one.order, two.order)


@pytest.mark.parametrize("kind", ["block_influence", "angular"])
def test_one_row_is_enough_for_an_angle(kind: str) -> None:
    one_row = chain(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64))
    expected = {"block_influence": 1.0, "angular": 0.5}[kind]
    assert float(criterion(kind).rank(one_row).curve[0]) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["gaussian", "max_sliced"])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_stream_that_does_not_vary_has_no_relative_distance(kind: str, rows: int) -> None:
    flat = torch.full((2, rows, 3), 0.1, dtype=torch.float64)
    assert float(criterion(kind).rank(chain(flat)).curve[0]) == 0
    flat[1] += 1
    with pytest.raises(CalibrationError) as error:
        criterion(kind).rank(chain(flat))
    assert "the stream in front does not vary" in error.value.problem
    assert error.value.where == f"block 'blocks.0', {rows} calibration rows"


@pytest.mark.parametrize("how", ["scale", "affine"])
def test_one_sample_cannot_be_held_out(how: str) -> None:
    evidence = chain(walk(), sample=torch.zeros(48, dtype=torch.int64))
    with pytest.raises(CalibrationError) as error:
        criterion("transport", replace=how).rank(evidence)
    assert error.value.problem == "1 calibration sample cannot be split to hold some out."
    assert "replace='identity'" in error.value.fix
    assert len(criterion("transport", replace="identity").rank(evidence).order) == 5


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("transport", {"longest_span": 0}),
        ("transport", {"folds": 1}),
        ("transport", {"replace": "bures"}),
        ("entropy", {"states": 4}),
        ("max_sliced", {"p": 0.5}),
        ("lacoot", {"directions": 0}),
    ],
)
def test_a_setting_out_of_range_is_refused(kind: str, setting: dict[str, object]) -> None:
    with pytest.raises(PolicyError) as error:
        LAYER_CRITERIA.resolve({"kind": kind, **setting})
    assert next(iter(setting)) in str(error.value)


def test_only_costs_in_the_unit_of_the_output_call_themselves_priced() -> None:
    assert [k for k in KINDS if LAYER_CRITERIA[k].priced] == ["loss_delta", "transport"]  # type: ignore[attr-defined]


# transport


def test_a_measured_price_is_a_share_of_what_the_removal_really_does() -> None:
    points = walk(2)
    evidence = chain(points)
    plain = Transport(replace="identity", measured="none").prices(evidence)
    real = [5.0 * float(plain[0, 0]), float(plain[1, 1]) / 2]
    tried = replace(evidence, trial=lambda gone: real[min(gone)])
    price = Transport(replace="identity", measured="removal", left=0.25).prices(tried)
    assert float(price[0, 0]) == pytest.approx(0.25 * real[0])
    assert float(price[1, 1]) == pytest.approx(0.25 * float(plain[1, 1]))
    assert float(price[0, 1]) == pytest.approx(0.25 * 5 * float(plain[0, 1]))


def test_a_price_is_what_a_quick_repair_leaves_and_a_span_does_what_it_does() -> None:
    real = {(0,): 1.0, (1,): 2.0, (2,): 2.0, (0, 1): 6.0, (1, 2): 3.0, (0, 1, 2): 10.0}
    evidence = replace(
        chain(walk(3)),
        mended=lambda gone: 0.1 * (1 + min(gone)),
        trial=lambda gone: real[tuple(sorted(gone))],
    )
    price = Transport(replace="identity").prices(evidence)
    torch.testing.assert_close(price.diagonal(), vector(0.1, 0.2, 0.3))
    assert float(price[0, 1]) == pytest.approx(0.3 * 2)  # together twice of what they do apart
    assert float(price[1, 2]) == pytest.approx(0.5)  # never less than the sum
    assert float(price[0, 2]) == pytest.approx(0.6 * 2)


def test_the_price_follows_what_stands_in_unless_it_is_said() -> None:
    assert Transport().following("identity").replace == "identity"  # type: ignore[attr-defined]
    assert Transport().following("bures").replace == "affine"  # type: ignore[attr-defined]
    said = Transport(replace="scale")
    assert said.following("identity") is said


@pytest.mark.parametrize("how", ["identity", "scale"])
def test_the_price_is_the_felt_error_as_a_share_of_the_output(how: str) -> None:
    points, v = walk(1), vector(1, 2, 3, 4, 5, 6)
    points[1] = points[0] + v
    evidence = chain(points, feel=torch.stack([v, vector(0, 0, 2, 0, 0, 1)]), power=4.0)
    price = Transport(replace=how, measured="none").prices(evidence)  # type: ignore[arg-type]
    expected = {"identity": (2 * 9 + 36) / 4, "scale": 0.0}[how]
    assert float(price) == pytest.approx(expected, abs=1e-12)


def test_a_block_that_scales_its_channels_costs_nothing_as_a_scale() -> None:
    points = walk(1)
    points[1] = points[0] * torch.linspace(-1, 2, 6) + 3
    dear, cheap = (Transport(replace=how).prices(chain(points)) for how in ("identity", "scale"))
    assert float(dear) > 1 and float(cheap) < 1e-12


def test_a_block_that_follows_the_layer_in_front_costs_nothing_as_an_affine_map() -> None:
    points, writer = walk(1), draw(48, 9, seed=5) + 2
    points[1] = points[0] + writer @ draw(9, 6, seed=6) + 1
    evidence = chain(points, writers=(writer,))
    dear, cheap = (Transport(replace=how).prices(evidence) for how in ("scale", "affine"))
    assert float(dear) > 1 and float(cheap) < 1e-8 * float(dear)


def test_without_a_layer_in_front_affine_is_a_scale() -> None:
    one, two = (Transport(replace=how).prices(chain(walk())) for how in ("scale", "affine"))
    assert torch.equal(one, two)


def test_what_follows_the_rows_only_by_chance_is_no_help() -> None:
    noise = chain(walk(1), writers=(draw(48, 40, seed=5),))
    alone, fitted = (
        float(span_costs(noise, replace=how, longest=1, folds=4)) for how in ("identity", "affine")
    )  # type: ignore[arg-type]
    writer = noise.writers[0]
    assert writer is not None
    within = torch.linalg.lstsq(writer, noise.points[1] - noise.points[0]).residuals
    assert float(within.sum()) / 48 < 0.4 * alone  # the fit flatters itself on its own rows
    assert fitted > 0.9 * alone


def test_rows_of_one_sample_do_not_tell_on_each_other() -> None:
    names = draw(8, 8, seed=5).repeat_interleave(6, dim=0)  # a writer that names the sample
    change = draw(8, 6, seed=6).repeat_interleave(6, dim=0)
    points = torch.stack([walk(1)[0], walk(1)[0] + change])
    sample = torch.arange(8).repeat_interleave(6)
    known = span_costs(chain(points, writers=(names,)), replace="affine", longest=1, folds=4)
    honest = span_costs(
        chain(points, writers=(names,), sample=sample), replace="affine", longest=1, folds=4
    )
    assert float(known) < 1e-6 and float(honest) > 1


def test_affine_never_costs_more_than_the_best_constant() -> None:
    evidence = CHAINS["written"]
    constant = replace(evidence, writers=(torch.zeros(48, 1, dtype=torch.float64),) * 5)
    fitted = span_costs(evidence, replace="affine", longest=5, folds=4)[1:, 1:]
    plain = span_costs(constant, replace="affine", longest=5, folds=4)[1:, 1:]
    reached = torch.isfinite(plain)
    assert bool((fitted[reached] <= plain[reached] * (1 + 1e-12)).all())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_both_forms_of_ridge_regression_agree_with_the_textbook(shape: tuple[int, int]) -> None:
    fit, aim, held = draw(*shape), draw(shape[0], 2, seed=1), draw(20, shape[1], seed=2)
    for ridge, predicted in zip(RIDGES, ridge_regression(fit, aim, held), strict=True):
        gram = fit.T @ fit
        lift = ridge * gram.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)
        expected = held @ torch.linalg.solve(gram + lift, fit.T @ aim)
        torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-6)


def test_a_wide_target_is_predicted_as_column_by_column() -> None:
    fit, aim, held = draw(30, 5), draw(30, 40, seed=1), draw(4, 5, seed=2)
    wide = list(ridge_regression(fit, aim, held))
    narrow = [list(ridge_regression(fit, aim[:, [c]], held)) for c in range(40)]
    for choice, predicted in enumerate(wide):
        columns = torch.cat([n[choice] for n in narrow], dim=1)
        torch.testing.assert_close(predicted, columns)


def test_a_pair_of_blocks_that_undo_each_other_costs_nothing() -> None:
    points = walk(4)
    points[3] = points[1]  # block 2 undoes block 1
    points[4] = points[3] + 0.5 * draw(48, 6, seed=8)
    rule = Transport(replace="identity")
    price = rule.prices(chain(points))
    assert float(price[1, 2]) == 0 and float(price[1, 1]) > 0


def test_greedy_removes_what_adds_least_beside_what_is_gone() -> None:
    inf = math.inf
    price = torch.tensor([[2.0, 9.0, 9.5], [inf, 1.0, 1.1], [inf, inf, 3.0]], dtype=torch.float64)
    ranking = greedy(price)
    assert ranking.order.tolist() == [0, 2, 1]
    assert ranking.curve.tolist() == [9.5, 1.1, 1.0, 0.0]


def test_equal_blocks_go_from_the_back() -> None:
    price = torch.ones(3, 3, dtype=torch.float64)
    assert greedy(price).order.tolist() == [0, 1, 2]


def test_a_curve_never_falls_as_blocks_go() -> None:
    price = torch.tensor([[2.0, 0.5], [math.inf, 3.0]], dtype=torch.float64)
    assert greedy(price).curve.tolist() == [2.0, 2.0, 0.0]


def test_runs_are_maximal() -> None:
    assert runs({5, 1, 2, 7, 6}) == [(1, 2), (5, 7)]
    assert runs([]) == []


def test_a_run_that_is_too_long_is_priced_as_spans_in_a_row() -> None:
    evidence = CHAINS["walk"]
    span = span_costs(evidence, replace="scale", longest=2, folds=4)
    assert bool(torch.isinf(span[0, 2:]).all()) and bool(torch.isfinite(span[0, :2]).all())
    price = priced_runs(span)
    expected = min(span[0, 0] + span[1, 2], span[0, 1] + span[2, 2])
    assert float(price[0, 2]) == pytest.approx(float(expected))
    tried = torch.isfinite(span)
    whole = span_costs(evidence, replace="scale", longest=5, folds=4)
    torch.testing.assert_close(price[tried], whole[tried])


def test_a_channel_that_is_dead_but_for_the_held_out_rows_breaks_no_scale() -> None:
    points = walk(1)
    points[0, 1:, 2] = 0
    points[1] = points[0] * 2
    price = Transport(replace="scale").prices(chain(points))
    assert bool(torch.isfinite(price).all())
    assert float(price) <= float(Transport(replace="identity").prices(chain(points))) * 1.01


# distances between distributions


def test_a_translation_moves_by_its_length() -> None:
    points, v = walk(1), vector(0, 3, 0, -4, 0, 0)
    points[1] = points[0] + v
    found = MaxSliced(relative=False).score(chain(points))
    assert float(found) == pytest.approx(5)
    spread = points[0] - points[0].mean(0)
    gaussian = criterion("gaussian").rank(chain(points)).curve[0]
    assert float(gaussian) == pytest.approx(5 / float(spread.square().sum(1).mean().sqrt()))


def test_the_relative_distance_is_in_spreads_of_the_input() -> None:
    points = walk(1)
    points[1] = points[0] + vector(0, 0, 7, 0, 0, 0)
    points[:, :, 2] += 3 * points[:1, :, 2]  # the widest channel, so above the average
    spread = float(points[0, :, 2].std(correction=0))
    found = MaxSliced().score(chain(points))
    assert float(found) == pytest.approx(7 / spread, rel=1e-6)


def test_a_clear_direction_is_found_whatever_the_channels_are_called() -> None:
    steps = torch.linspace(1, 3, 4, dtype=torch.float64).view(4, 1, 1) * draw(4, 1, 6, seed=1)
    evidence = chain(torch.cat([draw(1, 48, 6), steps.expand(4, 48, 6)]).cumsum(0))
    mixed = with_channels(evidence, torch.randperm(6))
    dead = torch.zeros(5, 48, 3, dtype=torch.float64)
    wider = chain(torch.cat([evidence.points, dead], dim=2))
    one, two, three = (MaxSliced().score(e) for e in (evidence, mixed, wider))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one, three)


def test_a_move_into_an_empty_channel_is_measured_by_the_average_spread() -> None:
    points = walk(1)
    points[0, :, 2] = 0
    points[1] = points[0] + vector(0, 0, 7, 0, 0, 0)
    live = points[0][:, [0, 1, 3, 4, 5]]
    average = (live - live.mean(0)).square().mean().sqrt()
    assert float(MaxSliced().score(chain(points))) == pytest.approx(7 / float(average))


def test_fifty_random_directions_are_blind_where_informed_ones_are_not() -> None:
    points = draw(1, 64, 4096).repeat(2, 1, 1)
    points[1, :, 17] += 5
    evidence = chain(points)
    assert float(MaxSliced(relative=False).score(evidence)) == pytest.approx(5)
    published = criterion("lacoot").rank(evidence).curve[0]
    assert float(published) == pytest.approx(0.2, abs=0.05)


def test_the_main_directions_see_a_change_of_shape_that_moments_hide() -> None:
    x, y = draw(512, 64) * 0.3, draw(512, 64, seed=1) * 0.3
    x[:, 5] = draw(512, seed=2)
    y[:, 5] = draw(512, seed=3).sign()  # mean 0 and variance 1 as well
    for column in (x[:, 5], y[:, 5]):
        column -= column.mean()
        column /= column.std(correction=0)
    true = (x[:, 5].sort().values - y[:, 5].sort().values).square().mean().sqrt()
    found = MaxSliced(relative=False).score(chain(torch.stack([x, y])))
    assert float(found) > 0.95 * float(true)


@pytest.mark.parametrize("kind", ["max_sliced", "lacoot", "gaussian"])
def test_swapped_rows_are_no_distance_but_a_price(kind: str) -> None:
    x = draw(48, 6)
    points = torch.stack([x, x.flip(0)])
    assert float(criterion(kind).rank(chain(points)).curve[0]) < 1e-6
    plain = criterion("transport", replace="identity", measured="none")
    paired = plain.rank(chain(points)).curve[0]
    assert float(paired) == pytest.approx(float((x - x.flip(0)).square().sum(1).mean()))


def test_a_stream_that_shrinks_is_no_closer() -> None:
    near = walk(1) * 1e-6
    assert float(criterion("max_sliced").rank(chain(near)).curve[0]) > 0.1
    assert float(criterion("lacoot").rank(chain(near)).curve[0]) < 1e-4


def test_gaussian_is_the_distance_of_bures_where_axes_are_shared() -> None:
    x = draw(400, 3)
    x = torch.linalg.qr(x - x.mean(0))[0] * 20  # mean 0, covariance 1
    scale = vector(1, 2, 3)
    points = torch.stack([x, x * scale])
    expected = float((scale - 1).norm()) / math.sqrt(3)
    assert float(criterion("gaussian").rank(chain(points)).curve[0]) == pytest.approx(expected)


# angles


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    points = walk(2)
    expected = 1 - F.cosine_similarity(points[:-1], points[1:], dim=2).mean(1)
    found = criterion("block_influence").score(chain(points))  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [((0, 0), (0, 0), 0.0), ((0, 0), (1, 0), 1.0), ((1, 0), (0, 0), 1.0), ((2, 0), (-1, 0), 2.0)],
)
def test_rows_of_zeros_have_a_defined_influence(
    x: tuple[float, ...], y: tuple[float, ...], expected: float
) -> None:
    points = torch.tensor([[x], [y]], dtype=torch.float64)
    assert float(criterion("block_influence").rank(chain(points)).curve[0]) == expected


def test_angular_looks_at_last_rows_only() -> None:
    points = torch.tensor([[[1, 0], [1, 0]], [[-1, 0], [1, 1]]], dtype=torch.float64)
    evidence = chain(points, last=torch.tensor([False, True]))
    assert float(criterion("angular").rank(evidence).curve[0]) == pytest.approx(0.25)


def test_angular_without_last_rows_says_so() -> None:
    evidence = chain(walk(), last=torch.zeros(48, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="no row is the last one of its sample"):
        criterion("angular").rank(evidence)


def turning(*degrees: float) -> ChainEvidence:
    """Turn a single row by so much in each block."""
    at = torch.deg2rad(vector(0, *degrees).cumsum(0))
    return chain(torch.stack([at.cos(), at.sin()], dim=1)[:, None])


def test_a_window_is_contiguous_at_every_size() -> None:
    order = criterion("angular").rank(turning(10, 30, 5, 40, 8)).order.tolist()
    for size in range(5):
        gone = order[size:]
        assert len(runs(gone)) == 1
    assert order[-1] == 2


def test_windows_grow_on_the_cheapest_way_and_not_greedily() -> None:
    # The best single block, 3, has dear neighbours; 0 and 1 undo each other.
    evidence = turning(20, -20, 70, 19, 70)
    ranking = criterion("angular").rank(evidence)
    assert set(ranking.order[-2:].tolist()) == {0, 1}
    assert float(ranking.curve[3]) == float(ranking.curve[4]) == pytest.approx(20 / 180)


def test_the_whole_window_costs_the_angle_across_the_chain() -> None:
    curve = criterion("angular").rank(turning(10, 30, 5)).curve
    assert curve.tolist() == pytest.approx([45 / 180, 35 / 180, 5 / 180, 0])


# activations


def test_half_on_half_off_is_one_bit() -> None:
    z = vector(-1, 1, -2, 3)[:, None]
    for kind in ("entropy", "easier"):
        rule = criterion(kind)
        assert isinstance(rule, SiteCriterion)
        assert rule.site(site(z)) == pytest.approx(1.0)


def test_units_that_never_change_count_in_easier_and_not_in_entropy() -> None:
    z = torch.stack([vector(-1, 1), vector(1, 2), vector(-1, -2)], dim=1)
    found = [criterion(kind).site(site(z)) for kind in ("entropy", "easier")]  # type: ignore[attr-defined]
    assert found == pytest.approx([1.0, 1 / 3])
    every = criterion("entropy", exclude_degenerate=False)
    assert every.site(site(z)) == pytest.approx(1 / 3)  # type: ignore[attr-defined]


def test_zero_is_off_in_entropy_and_on_in_easier() -> None:
    z = vector(0, 0, 0, -1)[:, None]
    found = [criterion(kind).site(site(z)) for kind in ("entropy", "easier")]  # type: ignore[attr-defined]
    quarter = float(entropy_bits(vector(0.25)))
    assert found == pytest.approx([0.0, quarter])


def test_a_rare_state_is_not_lost_between_batches() -> None:
    z = -torch.ones(64, 1, dtype=torch.float64)
    z[5] = 1
    pooled = criterion("entropy").site(site(z))  # type: ignore[attr-defined]
    batches = [criterion("entropy").site(site(b)) for b in z.split(8)]  # type: ignore[attr-defined]
    p = 1 / 64
    exact = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert pooled == pytest.approx(exact) and sum(batches) / 8 < 0.6 * exact


def test_a_cap_is_a_third_state_of_relu6_alone() -> None:
    z = vector(-1, 3, 7)[:, None]
    two, three = (criterion("entropy", states=s) for s in (2, 3))
    third = float(entropy_bits(vector(1 / 3)))
    assert two.site(site(z, "relu6")) == pytest.approx(third)  # type: ignore[attr-defined]
    assert three.site(site(z, "relu6")) == pytest.approx(math.log2(3))  # type: ignore[attr-defined]
    assert three.site(site(z, "relu")) == pytest.approx(third)  # type: ignore[attr-defined]


def test_a_unit_stuck_at_its_cap_has_no_entropy() -> None:
    z = vector(7, 8, 9)[:, None]
    assert criterion("entropy", states=3).site(site(z, "relu6")) == 0  # type: ignore[attr-defined]


def test_entropy_times_magnitude_needs_a_layer_in_front() -> None:
    rule, z = criterion("entropy", magnitude=True), vector(-1, 1)[:, None]
    assert rule.site(site(z, magnitude=0.25)) == pytest.approx(0.25)  # type: ignore[attr-defined]
    with pytest.raises(CalibrationError) as error:
        rule.site(site(z))  # type: ignore[attr-defined]
    assert error.value.problem == "activation 'act' has no linear layer in front."
    assert error.value.fix == "leave magnitude at False."


@given(p=st.floats(0, 1))
def test_bits_lie_between_none_and_one(p: float) -> None:
    assert 0 <= float(entropy_bits(vector(p))) <= 1 + 1e-12
    assert float(entropy_bits(vector(p))) == pytest.approx(
        float(entropy_bits(vector(1 - p))), abs=1e-9
    )


def test_tlc_reads_the_batch_norm_and_no_data() -> None:
    norm = (vector(0, 1, -1, 2, 0), vector(1, -1, 0, 0, 0))
    off = share_off(norm[0], norm[1].abs())
    assert off.tolist() == pytest.approx([0.5, 0.15865525393145707, 1.0, 0.0, 1.0])
    evidence = replace(site(draw(9, 5), norm=norm), count=0)
    expected = float(entropy_bits(off).mean())
    assert criterion("tlc").site(evidence) == pytest.approx(expected)  # type: ignore[attr-defined]


def test_tlc_without_a_batch_norm_takes_the_observed_mean_and_spread() -> None:
    z = draw(50, 4)
    norm = (z.mean(0), z.std(0, correction=0))
    rule = criterion("tlc")
    assert rule.site(site(z)) == rule.site(site(z, norm=norm))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("mean", "slope", "shift", "left"),
    [
        (0, 0.5, 0.399, 0.267),
        (1, 0.841, 0.242, 0.058),
        (-1, 0.159, 0.243, 0.631),
        (2, 0.977, 0.054, 0.0055),
    ],
)
def test_stein_in_closed_form_gives_the_known_numbers(
    mean: float, slope: float, shift: float, left: float
) -> None:
    norm = (vector(mean), vector(1))
    a, first, _ = rectified(*norm)
    assert float(a) == pytest.approx(slope, abs=1e-3)
    assert float(first - a * mean) == pytest.approx(shift, abs=2e-3)
    evidence = replace(site(draw(9, 1), norm=norm), count=0)
    assert Stein().site(evidence) == pytest.approx(left, abs=1e-3)


@pytest.mark.parametrize("function", ["relu", "relu6"])
@pytest.mark.parametrize("mean", [-2.0, 0.0, 3.0, 7.0])
def test_closed_forms_agree_with_a_fine_sample(function: str, mean: float) -> None:
    levels = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    z = mean + 2 * torch.special.ndtri(levels)
    phi = ACTIVATIONS[function](z)
    moments = {"relu": rectified, "relu6": relu6}[function](vector(mean), vector(2))
    assert [float(m) for m in moments[1:]] == pytest.approx(
        [float(phi.mean()), float(phi.square().mean())], rel=1e-4
    )
    norm = (vector(mean), vector(-2))  # a negative scale spreads as much
    seen, told = (
        Stein(data_free=f).site(site(z[:, None], function, norm=norm)) for f in (False, True)
    )
    assert seen == pytest.approx(told, rel=1e-3, abs=1e-6)


def test_stein_prefers_data_unless_told() -> None:
    norm = (vector(0), vector(1))
    linear = site(draw(50, 1).abs(), norm=norm)
    assert Stein().site(linear) < 1e-12
    assert Stein(data_free=True).site(linear) == pytest.approx(0.267, abs=1e-3)


def test_without_a_closed_form_stein_takes_data_even_if_told_not_to() -> None:
    evidence = site(draw(200, 2), "gelu", norm=(vector(0, 0), vector(1, 1)))
    assert Stein(data_free=True).site(evidence) == Stein().site(evidence) > 0


@pytest.mark.parametrize("fill", [-1.0, 0.0, 2.0])
def test_constant_dead_and_linear_units_score_nothing(fill: float) -> None:
    constant = torch.full((9, 2), fill, dtype=torch.float64)
    assert Stein().site(site(constant)) == 0
    assert Stein().site(site(draw(50, 2).abs())) < 1e-12
    norm = (vector(fill, fill), vector(0, 0))
    assert Stein(data_free=True).site(site(constant, norm=norm)) == 0


def test_stein_is_what_least_squares_leaves_of_what_is_read() -> None:
    z, reads = draw(300, 3) + vector(-1, 0, 1), vector(1, 4, 0.5)
    phi, left = F.relu(z), 0.0
    for c in range(3):
        design = torch.stack([z[:, c], torch.ones(300, dtype=torch.float64)], dim=1)
        fit = design @ torch.linalg.lstsq(design, phi[:, [c]]).solution
        left += float(reads[c] * (phi[:, c] - fit[:, 0]).square().mean())
    total = float((reads * phi.var(0, correction=0)).sum())
    assert Stein().site(site(z, reads=reads)) == pytest.approx(left / total)


def test_what_nobody_reads_scores_nothing() -> None:
    assert Stein().site(site(draw(50, 2), reads=vector(0, 0))) == 0


@given(shift=st.floats(-8, 8), scale=st.floats(1e-3, 1e3))
def test_stein_lies_between_nothing_and_everything(shift: float, scale: float) -> None:
    z = draw(40, 2) * scale + shift
    norm = (vector(shift, shift), vector(scale, scale))
    for free in (False, True):
        assert 0 <= Stein(data_free=free).site(site(z, norm=norm)) <= 1


@pytest.mark.parametrize("kind", SITES)
def test_the_order_of_an_activations_channels_does_not_matter(kind: str) -> None:
    z, order = draw(50, 4) + vector(-1, 0, 0.5, 2), torch.tensor([2, 0, 3, 1])
    known = {"reads": vector(1, 2, 3, 4), "norm": (vector(0, 1, 2, 3), vector(1, 1, 2, 2))}
    mixed = {"reads": known["reads"][order], "norm": tuple(v[order] for v in known["norm"])}  # type: ignore[index]
    rule = criterion(kind)
    assert isinstance(rule, SiteCriterion)
    assert rule.site(site(z, **known)) == pytest.approx(rule.site(site(z[:, order], **mixed)))


def test_a_block_scores_the_mean_of_its_activations() -> None:
    on, both = site(vector(1, 2)[:, None]), site(vector(-1, 1)[:, None])
    found = criterion("easier").score(chain(walk(2), sites=((on, both), (both,))))  # type: ignore[attr-defined]
    assert found.tolist() == pytest.approx([0.5, 1.0])


# trials and chance


class Trials:
    """A network in which blocks 0 and 1 can stand in for each other."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, gone: Collection[int]) -> float:
        self.asked.append(tuple(gone))
        return 0.1 * len(gone) + 5.0 * ({0, 1} <= set(gone)) + 1.0 * (2 in gone)


def test_greedy_trials_notice_that_two_blocks_need_one_of_them() -> None:
    ranking = LossDelta().rank(chain(walk(3), trial=Trials()))
    assert ranking.order.tolist() == [0, 2, 1]
    assert ranking.curve.tolist() == pytest.approx([6.3, 1.2, 0.1, 0.0])


def test_single_trials_do_not() -> None:
    trials = Trials()
    ranking = LossDelta(greedy=False).rank(chain(walk(3), trial=trials))
    assert ranking.order.tolist() == [2, 0, 1]
    assert ranking.curve.tolist() == pytest.approx([1.3, 0.2, 0.1, 0.0])
    assert trials.asked == [(0,), (1,), (2,)]


def test_greedy_trials_take_half_the_square_of_the_blocks() -> None:
    trials = Trials()
    LossDelta().rank(chain(walk(4), trial=trials))
    assert len(trials.asked) == 4 + 3 + 2 + 1 == len(set(trials.asked))


@pytest.mark.parametrize("greedy_too", [True, False])
def test_a_trial_that_fails_to_be_a_number_is_refused(greedy_too: bool) -> None:
    with pytest.raises(CalibrationError, match=r"block 1 scored nan"):
        LossDelta(greedy=greedy_too).rank(
            chain(walk(2), trial=lambda gone: math.nan if 1 in gone else 0.0)
        )


def test_chance_follows_the_seed_and_the_name_and_not_the_place() -> None:
    evidence = chain(walk(8))
    orders = [
        criterion("random").rank(e).order.tolist() for e in (evidence, replace(evidence, seed=1))
    ]
    assert orders[0] != orders[1]
    turned = replace(evidence, blocks=evidence.blocks[::-1])
    assert [7 - b for b in criterion("random").rank(turned).order.tolist()] == orders[0]
