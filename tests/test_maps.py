"""Transport maps: exact answers, laws, and two solvers that agree."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_otprune.errors import OTPruneError, PolicyError, RepairError, TransportError
from torch_otprune.maps import (
    AffineFit,
    AffineMap,
    DomainMap,
    Elastic,
    FittedMap,
    Flow,
    MongeMap,
    SparseMap,
    TransportMap,
    monge_gap,
)
from torch_otprune.maps.controller import DualController, within_budget
from torch_otprune.maps.domain_map import class_coupling
from torch_otprune.maps.elastic import CONVEX_L0
from torch_otprune.maps.flow import Critic, force, jkos
from torch_otprune.maps.fold import known_side
from torch_otprune.maps.gap import cost_matrix, paid
from torch_otprune.maps.mbo import fit_mbo
from torch_otprune.maps.samples import Samples
from torch_otprune.policy.registry import MAPS
from torch_otprune.transport import coupling, divergence, sqdist

QUICK = {
    "flow": {"kind": "flow", "anchors": 2},
    "monge_map": {"kind": "monge_map", "steps": 6},
}
KINDS = sorted(MAPS)
ELASTIC = [
    Elastic(reg="l1", weight=0.7),
    Elastic(reg="l0", weight=1.9, scale=1.1),
    Elastic(reg="stvs", scale=0.8),
    Elastic(reg="koverlap", weight=0.6, k=2),
]
DOUBLE = torch.float64


def cloud(rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=DOUBLE)


def spd(width: int, seed: int = 0) -> Tensor:
    root = cloud(width, width, seed)
    return root @ root.T / width + 0.3 * torch.eye(width, dtype=DOUBLE)


def made(kind: str) -> TransportMap:
    found = MAPS.resolve(QUICK.get(kind, {"kind": kind}))
    assert isinstance(found, TransportMap)
    return found


# The gap


def test_an_optimal_map_has_no_gap_and_a_rotation_has_its_own() -> None:
    x = cloud(128, 4)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DOUBLE)
    turned = torch.block_diag(turn, turn)
    for y in (x, x @ spd(4), x + 2.0):
        assert abs(float(monge_gap(x, y, solver="exact"))) < 1e-9
    scale = float(sqdist(x, x).mean())
    assert 0 <= float(monge_gap(x, x, eps=0.01)) < 5e-3 * scale
    assert float(monge_gap(x, x @ turned)) > 0.5 * scale


@pytest.mark.parametrize("cost", ["squared", "euclidean", ELASTIC[0], ELASTIC[1]])
def test_the_centred_gap_lies_above_the_exact_one_and_is_never_negative(cost: object) -> None:
    x, y = cloud(60, 3), cloud(60, 3, seed=1)
    exact = float(monge_gap(x, y, cost=cost, solver="exact"))  # type: ignore[arg-type]
    for eps in (0.02, 0.3):
        centred = float(monge_gap(x, y, cost=cost, eps=eps))  # type: ignore[arg-type]
        assert centred >= exact - 1e-2 * abs(exact) - 1e-9
        assert centred >= 0


def test_the_gap_is_the_brute_force_one_on_three_points() -> None:
    from itertools import permutations

    x, y = cloud(3, 2), cloud(3, 2, seed=1)
    costs = sqdist(x, y)
    least = min(sum(float(costs[i, p[i]]) for i in range(3)) for p in permutations(range(3)))
    expected = (float(costs.diagonal().sum()) - least) / 3
    assert float(monge_gap(x, y, solver="exact")) == pytest.approx(expected, abs=1e-12)


def test_the_gap_of_a_shuffled_map_is_larger() -> None:
    x = cloud(80, 3)
    y = x @ spd(3)
    assert float(monge_gap(x, y.flip(0), solver="exact")) > float(monge_gap(x, y, solver="exact"))


def test_the_gap_is_convex_in_the_images() -> None:
    x = cloud(40, 3)
    for seed in range(5):
        y, z = cloud(40, 3, seed=2 * seed + 1), cloud(40, 3, seed=2 * seed + 2)
        ends = [float(monge_gap(x, p, solver="exact")) for p in (y, z, (y + z) / 2)]
        assert ends[2] <= (ends[0] + ends[1]) / 2 + 1e-9


@pytest.mark.parametrize("cost", ["squared", "euclidean"])
def test_danskin_s_gradient_is_that_of_finite_differences(cost: str) -> None:
    x, y = cloud(12, 2), (cloud(12, 2, seed=3) + 1).requires_grad_()
    monge_gap(x, y, cost=cost, solver="exact").backward()  # type: ignore[arg-type]
    assert y.grad is not None
    step = 1e-6
    for row, column in ((0, 0), (5, 1), (11, 0)):
        ends = []
        for sign in (1, -1):
            moved = y.detach().clone()
            moved[row, column] += sign * step
            ends.append(float(monge_gap(x, moved, cost=cost, solver="exact")))  # type: ignore[arg-type]
        assert float(y.grad[row, column]) == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), rel=1e-4
        )


def test_points_without_images_have_no_gap() -> None:
    with pytest.raises(TransportError) as error:
        monge_gap(cloud(5, 2), cloud(6, 2))
    assert error.value.problem == "5 points and 6 images do not match."


# Elastic costs


@pytest.mark.parametrize("cost", ELASTIC, ids=lambda c: c.reg)
def test_the_proximal_step_is_the_best_point_of_a_fine_grid(cost: Elastic) -> None:
    grid = torch.linspace(-4, 4, 401, dtype=DOUBLE)
    points = torch.cartesian_prod(grid, grid)
    for v in torch.tensor([[0.3, -2.0], [1.2, 1.1], [-3.1, 0.05]], dtype=DOUBLE):
        objective = (points - v).square().sum(1) / 2 + cost.weight * cost.penalty(points)
        best = points[objective.argmin()]
        found = cost.prox(v)
        value = (found - v).square().sum() / 2 + cost.weight * cost.penalty(found)
        assert float(value) <= float(objective.amin()) + 1e-9
        torch.testing.assert_close(found, best, atol=0.025, rtol=0)


@pytest.mark.parametrize("cost", ELASTIC, ids=lambda c: c.reg)
def test_the_slope_is_the_derivative_of_the_penalty(cost: Elastic) -> None:
    z = cloud(6, 3).requires_grad_()
    (slope,) = torch.autograd.grad(cost.penalty(z).sum(), z)
    torch.testing.assert_close(cost.slope(z.detach()), cost.weight * slope)


@pytest.mark.parametrize("cost", ELASTIC, ids=lambda c: c.reg)
def test_the_proximal_step_undoes_a_point_plus_its_slope(cost: Elastic) -> None:
    z = cloud(20, 4) + 0.1
    if cost.reg == "koverlap":  # of a point, only what the norm lets free has one slope
        z[:, 2:] = 0
    torch.testing.assert_close(cost.prox(z + cost.slope(z)), z, atol=1e-6, rtol=0)


def test_l1_stvs_and_koverlap_leave_exact_zeros_and_l0_does_not() -> None:
    v = cloud(50, 6)
    zeros = {c.reg: bool((c.prox(v) == 0).any()) for c in ELASTIC}
    assert zeros == {"l1": True, "stvs": True, "koverlap": True, "l0": False}


def test_the_threshold_of_l0_is_where_its_curvature_turns_negative() -> None:
    assert abs(CONVEX_L0 - 2.2408) < 1e-4
    z = torch.linspace(0.5, 4, 4001, dtype=DOUBLE)
    for weight, convex in ((2.2, True), (2.3, False)):
        bell = (-z.square() / 2).exp()
        curvature = 1 + weight * bell * (1 - z.square())
        assert bool((curvature >= 0).all()) == convex


@given(st.floats(0.1, 10), st.floats(0.01, 4))
def test_a_weight_past_the_threshold_is_refused_with_one_that_is_not(
    scale: float, excess: float
) -> None:
    weight = (CONVEX_L0 + excess) * scale**2
    with pytest.raises(PolicyError) as error:
        Elastic(reg="l0", weight=weight, scale=scale)
    assert "past the convexity threshold" in error.value.problem
    assert "use a weight up to" in error.value.fix and "a scale of at least" in error.value.fix
    Elastic(reg="l0", weight=CONVEX_L0 * scale**2 * (1 - 1e-9), scale=scale)


def test_stvs_at_another_weight_is_refused() -> None:
    with pytest.raises(PolicyError) as error:
        Elastic(reg="stvs", weight=2.0)
    assert "no closed proximal step at weight 2" in error.value.problem


@pytest.mark.parametrize("cost", ELASTIC, ids=lambda c: c.reg)
def test_the_matrix_of_costs_prices_the_pairs(cost: Elastic) -> None:
    x, y = cloud(7, 3), cloud(7, 3, seed=1)
    torch.testing.assert_close(cost_matrix(x, y, cost).diagonal(), paid(x, y, cost))


# Affine


def test_the_bures_map_of_moments_is_recovered() -> None:
    x, wanted = cloud(4000, 5), spd(5)
    white = torch.linalg.cholesky(torch.cov(x.T, correction=0))
    x = torch.linalg.solve_triangular(white, (x - x.mean(0)).T, upper=False).T
    found = AffineMap().fit(x, x.flip(0) @ wanted + 3.0)
    assert isinstance(found, AffineFit)
    torch.testing.assert_close(found.matrix, wanted, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.shift, torch.full((5,), 3.0, dtype=DOUBLE), atol=1e-8, rtol=0)


def test_least_squares_recovers_an_affine_map_across_widths() -> None:
    x, weight = cloud(200, 4), cloud(6, 4, seed=2)
    found = AffineMap(ridge=0).fit(x, x @ weight.T - 1, True)
    assert isinstance(found, AffineFit)
    torch.testing.assert_close(found.matrix, weight, atol=1e-7, rtol=0)
    assert found.report.fit_before is None and found.report.gap_after is None


def test_pairs_may_be_given_by_row_numbers() -> None:
    x, weight = cloud(100, 3), spd(3)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([order, torch.arange(100)], dim=1)
    found = AffineMap().fit(x, (x @ weight)[order], rows)
    torch.testing.assert_close(found(x), x @ weight, atol=1e-4, rtol=0)


# Contract of every map


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [None, True])
def test_every_map_brings_the_law_nearer_and_reports_it(kind: str, pairs: bool | None) -> None:
    x = cloud(160, 4)
    y = x @ spd(4, seed=5) * 0.5 + 4.0
    report = made(kind).fit(x, y, pairs).report
    assert report.fit_before is not None
    assert report.fit_after < 0.9 * report.fit_before
    assert (report.kind, report.rows, report.channels) == (kind, 160, 4)
    assert report.null > 0 and 0 < report.moved <= 4
    assert (report.error_after is None) == (pairs is None)
    assert report.gap_after is not None and report.gap_after > -1e-9
    assert "distance to the target" in str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_follows_when_both_clouds_are_shifted(kind: str) -> None:
    x = cloud(96, 3)
    y = x @ spd(3, seed=6) + 1
    plain, moved = (made(kind).fit(x + s, y + s, True) for s in (0.0, 7.0))
    torch.testing.assert_close(moved(x + 7.0), plain(x) + 7.0, atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_is_the_same_every_time_and_leaves_the_generator_alone(kind: str) -> None:
    x, y = cloud(64, 3), cloud(64, 3, seed=1) * 2 + 1
    state = torch.get_rng_state()
    first, again = (made(kind).fit(x, y)(x) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_map_and_its_module_compute_what_the_map_does(kind: str) -> None:
    x, y = cloud(64, 3), cloud(64, 3, seed=1) * 2 + 1
    found = made(kind).fit(x, y)
    torch.manual_seed(0)
    layer, behind = nn.Linear(5, 3).double(), nn.Linear(3, 2).double()
    seen = cloud(9, 5)
    want, want_behind = found(layer(seen)).detach(), behind(found(x))
    found.fold_into(layer)
    found.fold_into(behind, side="in")
    torch.testing.assert_close(layer(seen), want)
    torch.testing.assert_close(behind(x), want_behind)
    torch.testing.assert_close(found.module().double()(x), found(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dead", ["source channel", "target channel", "source", "target"])
def test_what_never_varies_does_no_harm(kind: str, dead: str) -> None:
    x, y = cloud(60, 3), cloud(60, 3, seed=1)
    still = x if dead.startswith("source") else y
    if "channel" in dead:
        still[:, 1] = 0
    else:
        still[:] = 0
    for pairs in (None, True):
        found = made(kind).fit(x, y, pairs)
        assert bool(found(x).isfinite().all()) and math.isfinite(found.report.fit_after)


@pytest.mark.parametrize("kind", KINDS)
def test_unpaired_sets_of_different_dimension_are_refused(kind: str) -> None:
    with pytest.raises(TransportError) as error:
        made(kind).fit(cloud(20, 3), cloud(20, 4))
    assert error.value.problem == "unpaired sets of 3 and 4 dimensions have no common space."
    assert "pad the narrower set" in error.value.fix


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "affine"])
def test_only_least_squares_maps_across_widths(kind: str) -> None:
    with pytest.raises(TransportError) as error:
        made(kind).fit(cloud(20, 3), cloud(20, 4), True)
    assert error.value.problem == f"{kind} maps no 3 dimensions onto 4."


def test_too_few_samples_for_the_dimension_warn_with_the_null() -> None:
    with pytest.warns(UserWarning, match="12 samples in 8 dimensions are too few") as caught:
        found = AffineMap().fit(cloud(12, 8), cloud(12, 8, seed=1))
    text = str(caught[0].message)
    assert f"random halves of the target {found.report.null:.3g}" in text
    assert "at least 16 rows" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AffineMap().fit(cloud(16, 8), cloud(16, 8, seed=1))


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (True, "20 and 21 rows are not paired."),
        (torch.zeros(3), "pairs of shape (3,) match no rows."),
        (torch.tensor([[0, 0], [1, 1], [2, 2], [0, 21]]), "a pair names a row that is not there."),
    ],
)
def test_pairs_that_match_no_rows_are_refused(pairs: Tensor | bool, problem: str) -> None:
    with pytest.raises(TransportError) as error:
        AffineMap().fit(cloud(20, 2), cloud(21, 2), pairs)
    assert error.value.problem == problem
    assert "k x 2 matrix of row numbers" in error.value.fix


def test_three_samples_are_no_map() -> None:
    with pytest.raises(TransportError) as error:
        AffineMap().fit(cloud(3, 2), cloud(3, 2))
    assert error.value.problem == "3 samples are too few for a map."


# Folding


def test_a_map_folds_into_a_convolution_and_the_norm_behind_it() -> None:
    torch.manual_seed(0)
    conv, norm = (
        nn.Conv2d(3, 4, 3, padding=1, bias=False).double(),
        nn.BatchNorm2d(4).double().eval(),
    )
    x = torch.randn(2, 3, 5, 5, dtype=DOUBLE)
    found = AffineMap().fit(cloud(50, 4), cloud(50, 4, seed=1) + 1)
    wanted = norm(found(conv(x).movedim(1, -1)).movedim(-1, 1))
    found.fold_into(conv, norm=norm)
    torch.testing.assert_close(norm(conv(x)), wanted)


def test_a_map_of_whole_patches_folds_exactly_even_at_the_border() -> None:
    from torch_otprune.statistics.patches import full_weight, rows

    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 3, 3, padding=1).double(), torch.randn(4, 2, 4, 4, dtype=DOUBLE)
    patches = rows(conv, x, torch.arange(16))
    found = AffineMap().fit(patches, patches * 1.5 + 0.5)
    assert conv.bias is not None
    wanted = found(patches) @ full_weight(conv).T + conv.bias
    found.fold_into(conv, side="in")
    got = conv(x).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(got, wanted)


def test_a_map_folds_into_a_layer_whose_weight_lies_across() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is absent")
    layer, x = utils.Conv1D(4, 7).double(), cloud(9, 7)  # outputs first
    found = AffineMap().fit(cloud(50, 4), cloud(50, 4, seed=1) + 1)
    wanted = found(layer(x)).detach()
    found.fold_into(layer)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize(
    ("layer", "side", "problem"),
    [
        (nn.Linear(4, 4, bias=False), "out", "nothing takes up the constant of the map."),
        (nn.Linear(4, 5), "out", "a map of 4 onto 4 channels does not fit."),
        (nn.Conv2d(4, 4, 3, groups=2), "out", "a map cannot be multiplied into this layer."),
        (nn.Conv2d(4, 2, 3, padding=1), "in",
         "the constant of the map would be missing from the zeros of the padding."),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_is_refused_and_left_as_it_was(
    layer: nn.Module, side: str, problem: str
) -> None:
    found = AffineMap().fit(cloud(50, 4), cloud(50, 4, seed=1) + 1)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(RepairError) as error:
        found.fold_into(layer, side=side)  # type: ignore[arg-type]
    assert error.value.problem == problem and error.value.fix
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())


# The Monge map


def test_a_weightless_gap_and_pairs_leave_least_squares_where_it_is() -> None:
    x = cloud(400, 3)
    y = x @ spd(3) + 1
    fits = MongeMap(weight=0.0).fit(x, y, True), AffineMap().fit(x, y, True)
    torch.testing.assert_close(fits[0](x), fits[1](x), atol=1e-3, rtol=0)


def test_the_gap_s_weight_takes_a_needless_rotation_back() -> None:
    x = cloud(600, 2)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DOUBLE)
    found = MongeMap(weight=2.0, steps=150, rate=0.05).fit(x, x @ turn.T, True).report
    assert found.gap_before is not None and found.gap_after is not None
    assert found.gap_after < 0.5 * found.gap_before


@pytest.mark.parametrize("cost", ["euclidean", "elastic"])
def test_a_rotation_is_taken_back_under_every_cost(cost: str) -> None:
    x = cloud(300, 2)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DOUBLE)
    setting = MongeMap(cost=cost, weight=2.0, steps=60, rate=0.05, batch=128)  # type: ignore[arg-type]
    found = setting.fit(x, x @ turn.T, True).report
    assert found.gap_before is not None and found.gap_after is not None
    assert found.gap_after < 0.8 * found.gap_before


def test_an_unpaired_monge_map_agrees_with_the_bures_map_on_gaussians() -> None:
    x, wanted = cloud(1500, 3), spd(3)
    y = cloud(1500, 3, seed=9) @ wanted + 1
    found, bures = (m.fit(x, y)(x) for m in (MongeMap(steps=30), AffineMap()))
    assert float((found - bures).square().sum(1).mean() / y.var(0).sum()) < 0.02


def test_a_hidden_layer_fits_what_no_affine_map_does() -> None:
    x = cloud(800, 2)
    y = torch.stack([x[:, 0].abs(), x[:, 1]], dim=1)
    bent, straight = (MongeMap(form=f, weight=0.0, steps=120, rate=0.02) for f in ("mlp", "affine"))
    errors = [m.fit(x, y, True).report.error_after for m in (bent, straight)]
    assert errors[0] is not None and errors[1] is not None
    assert errors[0] < 0.5 * errors[1]


def test_a_map_that_bends_is_not_folded() -> None:
    found = MongeMap(form="mlp", steps=1).fit(cloud(64, 2), cloud(64, 2, seed=1))
    with pytest.raises(TransportError) as error:
        found.fold_into(nn.Linear(2, 2))
    assert error.value.problem == "a map of kind monge_map is not affine."
    assert "`module()`" in error.value.fix


# The sparse map


def displaced(rows: int = 400, width: int = 6) -> tuple[Tensor, Tensor]:
    x = cloud(rows, width)
    y = x.clone()
    y[:, [1, 4]] = x[:, [1, 4]] @ spd(2) + torch.tensor([3.0, -2.0], dtype=DOUBLE)
    return x, y


@pytest.mark.parametrize("pairs", [True, None])
def test_a_known_sparse_displacement_is_recovered_with_exact_zeros(pairs: bool | None) -> None:
    x, y = displaced()
    found = SparseMap(budget=2).fit(x, y if pairs else y.flip(0), pairs)
    assert isinstance(found, AffineFit)
    rows = torch.cat([found.matrix - torch.eye(6, dtype=DOUBLE), found.shift[:, None]], dim=1)
    assert (rows != 0).any(1).nonzero().flatten().tolist() == [1, 4]
    if pairs:
        torch.testing.assert_close(found(x), y, atol=1e-4, rtol=0)


def test_channels_that_stay_keep_their_weights_bit_for_bit() -> None:
    x, y = displaced()
    torch.manual_seed(0)
    layer = nn.Linear(5, 6).double()
    before = layer.weight.detach().clone()
    SparseMap(budget=2).fit(x, y, True).fold_into(layer)
    stay = [0, 2, 3, 5]
    assert torch.equal(layer.weight[stay], before[stay])
    assert not torch.equal(layer.weight[[1, 4]], before[[1, 4]])


def test_the_paired_rows_that_are_kept_are_the_best_of_all_subsets() -> None:
    from itertools import combinations

    x = cloud(200, 5)
    y = x + (x @ cloud(5, 5, seed=3)) * torch.tensor([0.3, 1.0, 0.1, 0.7, 0.2], dtype=DOUBLE)
    y = y + cloud(200, 5, seed=4) * 0.1
    found = SparseMap(budget=2).fit(x, y, True)
    full = AffineMap(ridge=1e-9).fit(x, y, True)(x)
    errors = {}
    for kept in combinations(range(5), 2):
        mixed = x.clone()
        mixed[:, kept] = full[:, kept]
        errors[kept] = float((mixed - y).square().sum())
    best = min(errors.values())
    assert float((found(x) - y).square().sum()) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("budget", "allowed"), [(3, 3), (0.5, 4), (1.0, 8), (20, 8), (None, 4), (0, 0)]
)
def test_a_budget_is_a_number_or_a_share(budget: float | None, allowed: int) -> None:
    assert SparseMap(budget=budget).allowed(8) == allowed


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"budget": 2.5}, "a share of 2.5 of the channels cannot move."),
        ({"budget": 2, "solver": "w2gn"}, "the solver 'w2gn' keeps no budget"),
        ({"budget": 2, "solver": "mbo", "elastic": {"reg": "l0"}},
         "a smoothed l0 leaves no coordinate exactly 0"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_kept_is_refused(setting: dict[str, object], problem: str) -> None:
    with pytest.raises(PolicyError) as error:
        SparseMap(**setting)  # type: ignore[arg-type]
    assert problem in error.value.problem and error.value.fix


@pytest.mark.parametrize("cost", ELASTIC, ids=lambda c: c.reg)
def test_the_entropic_map_s_gradient_is_that_of_its_soft_minimum(cost: Elastic) -> None:
    x, y = cloud(30, 3), cloud(25, 3, seed=1)
    body = fit_mbo(x, y, cost, eps=0.1)
    at = (cloud(7, 3, seed=2) + 0.05).requires_grad_()
    (slope,) = torch.autograd.grad(body.potential(at).sum(), at)
    torch.testing.assert_close(body.gradient(at.detach()), slope)


def test_displacements_of_the_entropic_map_have_exact_zeros_and_new_points_are_mapped() -> None:
    x, y = displaced(200)
    found = SparseMap(solver="mbo", elastic=Elastic(weight=0.8)).fit(x, y)
    new = cloud(50, 6, seed=8)
    still = (found(new) == new).double().mean(0)
    assert float(still[[0, 2, 3, 5]].mean()) > 0.5
    assert float(still[[1, 4]].mean()) < 0.2


def test_a_budget_of_coordinates_is_met_on_average() -> None:
    x, y = displaced(150)
    found = SparseMap(solver="mbo", budget=2).fit(x, y + 0.1)
    assert 1.0 <= float((found(x) != x).double().sum(1).mean()) <= 2.0


@pytest.mark.parametrize("solver", ["icnn", "w2gn", "lbfgs"])
def test_a_dual_agrees_with_the_bures_map_on_gaussians(solver: str) -> None:
    x, wanted = cloud(800, 3), spd(3)
    y = cloud(800, 3, seed=9) @ wanted + 1
    setting = SparseMap(solver=solver, steps=20, elastic=Elastic(weight=0.0))  # type: ignore[arg-type]
    found, bures = setting.fit(x, y), AffineMap().fit(x, y)
    assert float((found(x) - bures(x)).square().sum(1).mean() / y.var(0).sum()) < 0.02


@pytest.mark.parametrize("solver", ["icnn", "w2gn", "lbfgs"])
def test_the_map_of_a_dual_is_monotone(solver: str) -> None:
    x, y = cloud(200, 3), cloud(200, 3, seed=1).abs() * 2
    found = SparseMap(solver=solver, steps=10).fit(x, y)  # type: ignore[arg-type]
    a, b = cloud(100, 3, seed=2), cloud(100, 3, seed=3)
    assert bool((((found(a) - found(b)) * (a - b)).sum(1) >= -1e-9).all())


def test_a_dual_bends_where_the_bures_map_cannot() -> None:
    x = cloud(1500, 2)
    y = torch.where(x > 0, 2 * x + 1, 0.5 * x - 1)
    setting = SparseMap(solver="lbfgs", steps=100, elastic=Elastic(weight=0.0))
    errors = [float((m.fit(x, y.flip(0))(x) - y).square().mean()) for m in (setting, AffineMap())]
    assert errors[0] < 0.7 * errors[1]


@given(st.integers(1, 20), st.floats(0.01, 50))
@settings(max_examples=25)
def test_the_controller_hits_its_budget_to_within_one(budget: int, start: float) -> None:
    sizes = torch.linspace(0.2, 9.7, 40, dtype=DOUBLE)
    found = within_budget(lambda price: float((sizes > price).sum()), budget, start)
    assert found.met and budget - 1 <= found.count <= budget


def test_the_price_rests_where_the_budget_is_met() -> None:
    control = DualController(4.0, price=1.0)
    assert control.see(4.0) == 1.0
    assert control.see(6.0) > 1.0
    assert DualController(4.0, price=1.0).see(2.0) < 1.0


@pytest.mark.parametrize(("budget", "price"), [(-1.0, 1.0), (2.0, 0.0), (math.nan, 1.0)])
def test_a_controller_without_a_budget_or_a_price_is_refused(budget: float, price: float) -> None:
    with pytest.raises(TransportError):
        DualController(budget, price)


# The domain map


def test_the_diagonal_map_is_what_a_batch_norm_re_estimates() -> None:
    x, y = cloud(300, 4) * 2 + 1, cloud(300, 4, seed=1)
    moved = DomainMap(method="diagonal", ridge=0).fit(x, y)(x)
    wanted = (x - x.mean(0)) / x.std(0, correction=0) * y.std(0, correction=0) + y.mean(0)
    torch.testing.assert_close(moved, wanted)


def test_no_strength_stays_and_half_of_it_goes_half_way() -> None:
    x, y = cloud(100, 3) * 2 + 1, cloud(100, 3, seed=1)
    still, half, whole = (DomainMap(strength=s).fit(x, y)(x) for s in (0.0, 0.5, 1.0))
    torch.testing.assert_close(still, x)
    torch.testing.assert_close(half, (x + whole) / 2)


def test_weightless_classes_are_the_plain_plan() -> None:
    costs, labels = sqdist(cloud(30, 2), cloud(30, 2, seed=1)), torch.arange(30) % 3
    plain = coupling(costs, eps=0.05).plan()
    torch.testing.assert_close(class_coupling(costs, labels, weight=0.0).plan(), plain)


def test_classes_keep_the_mass_of_a_point_together() -> None:
    x = cloud(60, 2)
    labels = (x[:, 0] > 0).long()
    costs = sqdist(x, x + 0.3 * cloud(60, 2, seed=1))
    one = torch.nn.functional.one_hot(labels).to(costs)

    def spread(weight: float) -> float:
        plan = class_coupling(costs, labels, weight=weight, eps=0.05).plan()
        share = (plan @ one) / plan.sum(1, keepdim=True)
        return float(torch.special.entr(share).sum(1).mean())

    assert spread(1.0) < 0.7 * spread(0.0)


def test_classes_of_the_home_domain_bring_a_shifted_one_nearer() -> None:
    # Two classes side by side; the shift carries one half way to the other.
    kinds = torch.arange(400) % 2
    y = cloud(400, 2) * 0.3 + torch.where(kinds[:, None] == 1, 1.0, -1.0)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=DOUBLE)
    x = y.roll(1, 0) @ turn

    def off(weight: float) -> float:
        found = DomainMap(method="coupled", classes=weight).fit(x, y, labels=kinds)
        return float((found(x) - y.roll(1, 0)).square().sum(1).mean())

    assert off(0.5) < 0.5 * off(0.0)


@pytest.mark.parametrize(
    ("method", "labels", "problem"),
    [
        ("auto", torch.zeros(5).long(), "labels of shape (5,) name no class for 20 target rows."),
        ("bures", torch.zeros(20).long(), "classes cannot be used: the method is 'bures'."),
    ],
)
def test_labels_that_cannot_be_used_are_refused(method: str, labels: Tensor, problem: str) -> None:
    with pytest.raises(TransportError) as error:
        DomainMap(method=method).fit(cloud(20, 2), cloud(20, 2), labels=labels)  # type: ignore[arg-type]
    assert error.value.problem == problem


def test_a_weight_of_classes_without_a_plan_is_refused() -> None:
    with pytest.raises(PolicyError) as error:
        DomainMap(method="bures", classes=0.5)
    assert "makes no plan that classes could change" in error.value.problem


# The flow


def test_particles_on_the_target_stay() -> None:
    x = cloud(60, 2)
    moved, energies = jkos(x, x, lambda p: force(p, x), step=1.0, anchors=3)
    assert float((moved - x).abs().max()) < 1e-3 and energies[0] < 1e-6


def test_the_energy_falls_from_anchor_to_anchor() -> None:
    x, y = cloud(60, 2), cloud(60, 2, seed=1).abs() * 2 + 1
    _, energies = jkos(x, y, lambda p: force(p, y), step=0.5, anchors=5)
    assert len(energies) == 6
    assert all(later < earlier for earlier, later in itertools.pairwise(energies))


def test_the_force_is_minus_the_gradient_of_half_the_squared_divergence() -> None:
    x, y = cloud(20, 2).requires_grad_(), cloud(20, 2, seed=1) + 2
    half = divergence(x, y, eps=0.05).square() / 2
    (slope,) = torch.autograd.grad(half, x)
    found = force(x.detach(), y, eps=0.05)  # each term at its own temperature
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), -slope.flatten(), dim=0)
    assert float(cosine) > 0.99


def test_the_critic_sees_no_difference_between_equal_samples() -> None:
    y = cloud(300, 2)
    torch.manual_seed(0)
    critic = Critic(y.clone(), width=8)
    critic.ascend(y, steps=60)
    assert abs(float(critic.value(y).detach())) < 0.02


def test_the_critic_s_value_of_laws_apart_is_nearly_log_two() -> None:
    y = cloud(200, 2)
    torch.manual_seed(0)
    critic = Critic(y, width=8, rate=0.05)
    critic.ascend(y + 20, steps=60)
    assert 0.9 * math.log(2) < float(critic.value(y + 20).detach()) <= math.log(2)


def test_the_variational_flow_comes_nearer() -> None:
    x, y = cloud(100, 2), cloud(100, 2, seed=1) + 3
    report = Flow(energy="jsd", anchors=6, rate=0.05).fit(x, y).report
    assert report.fit_before is not None
    assert report.fit_after < 0.9 * report.fit_before


def test_points_move_with_the_nearest_particle() -> None:
    x, y = cloud(50, 2), cloud(50, 2, seed=1) + 3
    found = Flow(form="points", anchors=2).fit(x, y)
    assert float((found(x) - x).norm(dim=1).min()) > 1
    near = x + 1e-9
    torch.testing.assert_close(found(near) - near, found(x) - x)


def test_a_distance_of_samples_rewards_lost_spread_and_the_maps_do_not_follow() -> None:
    x, y = cloud(256, 32), cloud(256, 32, seed=1)
    assert float(divergence(0.5 * x, y)) < float(divergence(x, y))
    for found in (MongeMap().fit(x, y), Flow(anchors=2).fit(x, y)):
        assert float(found(x).var(0).mean() / y.var(0).mean()) > 0.9


def test_a_start_as_near_as_chance_is_kept_and_the_report_says_so() -> None:
    x, y = cloud(256, 32), cloud(256, 32, seed=1) * 2 + 1
    found, start = MongeMap().fit(x, y), AffineMap().fit(x, y)
    torch.testing.assert_close(found(x), start(x))
    assert "as near as chance can tell" in str(found.report)


# What a review found


def k_support(z: Tensor, k: int) -> float:
    """Half the squared k-support norm, by the closed form of Argyriou et al. 2012."""
    size = z.abs().sort(descending=True).values
    for r in range(k):
        rest = float(size[k - r - 1 :].sum()) / (r + 1)
        above = math.inf if k - r - 1 == 0 else float(size[k - r - 2])
        if above > rest >= float(size[k - r - 1]) - 1e-12:
            return float(size[: k - r - 1].square().sum() + (r + 1) * rest**2) / 2
    raise AssertionError("no split fits")


@given(st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=40)
def test_the_overlap_penalty_is_half_the_squared_k_support_norm(k: int, seed: int) -> None:
    z = cloud(1, 5, seed)[0]
    penalty = float(Elastic(reg="koverlap", k=k).penalty(z))
    assert penalty == pytest.approx(k_support(z, k), rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_a_residue_next_to_zero_does_not_change_the_overlap_s_step(k: int) -> None:
    cost = Elastic(reg="koverlap", weight=0.5, k=k)
    v = torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=DOUBLE)
    for residue in (1e-300, 1e-30, 1e-12):
        near = v + torch.tensor([0.0, 0.0, residue, residue], dtype=DOUBLE)
        torch.testing.assert_close(cost.prox(near), cost.prox(v))
    if k == 1:  # shares 5/6 and 1/6: v times share over share plus weight
        wanted = torch.tensor([1.25, 0.25, 0.0, 0.0], dtype=DOUBLE)
        torch.testing.assert_close(cost.prox(v), wanted)


def test_a_gap_by_an_unknown_solver_or_cost_is_refused() -> None:
    x, bare = cloud(5, 2), inspect.unwrap(monge_gap)  # without the tests' own check of types
    with pytest.raises(TransportError) as error:
        bare(x, x, solver="guess")  # type: ignore[arg-type]
    assert error.value.problem == "'guess' is no solver of the gap." and error.value.fix
    with pytest.raises(TransportError) as error:
        inspect.unwrap(cost_matrix)(x, x, "manhattan")  # type: ignore[arg-type]
    assert error.value.problem == "'manhattan' is no cost of a displacement."


def test_a_budget_that_no_weight_meets_is_refused_instead_of_missed() -> None:
    # a point at the rim has all targets on one side and moves at any weight of l1
    x = cloud(50, 3)
    with pytest.raises(TransportError) as error:
        SparseMap(solver="mbo", budget=0).fit(x, cloud(50, 3, seed=1) + 1)
    assert "leaves as few as 0 coordinates moved" in error.value.problem
    assert "raise the budget" in error.value.fix


@pytest.mark.parametrize("kind", KINDS)
def test_three_pairs_are_no_map(kind: str) -> None:
    pairs = torch.tensor([[0, 0], [1, 1], [2, 2]])
    with pytest.raises(TransportError) as error:
        made(kind).fit(cloud(50, 2), cloud(50, 2), pairs)
    assert error.value.problem == "3 pairs are too few for a map."


def test_few_pairs_among_many_rows_warn() -> None:
    x = cloud(200, 8)
    with pytest.warns(UserWarning, match="12 samples in 8 dimensions are too few"):
        AffineMap().fit(x, x, torch.arange(12)[:, None].expand(12, 2))


def test_pairs_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(TransportError) as error:
        Samples.read(cloud(20, 2), cloud(20, 2), "yes")  # type: ignore[arg-type]
    assert error.value.problem == "pairs of type str match no rows."


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(RepairError) as error:
        known_side("both", "fold_into")
    assert error.value.problem == "'both' is no side of a layer."
    assert error.value.where == "fold_into, argument side"


def test_a_fitted_map_shows_its_numbers_and_not_its_samples() -> None:
    found = AffineMap().fit(cloud(50, 2), cloud(50, 2, seed=1))
    assert "matrix=" in repr(found) and "samples=" not in repr(found)


@pytest.mark.parametrize("points", [torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64)])
def test_points_that_a_map_cannot_map_are_refused(points: Tensor) -> None:
    found = AffineMap().fit(cloud(50, 2), cloud(50, 2, seed=1))
    call = inspect.unwrap(FittedMap.__call__)  # without the tests' own check of types
    with pytest.raises(TransportError) as error:
        call(found, points)
    assert "cannot be mapped" in error.value.problem
    assert error.value.fix == "pass floating-point numbers with 2 channels in the last axis."


def test_a_norm_of_another_layer_is_refused_before_anything_is_written() -> None:
    conv = nn.Conv2d(2, 3, 1, bias=False)
    before = conv.weight.detach().clone()
    found = AffineMap().fit(cloud(50, 3), cloud(50, 3, seed=1))
    with pytest.raises(RepairError) as error:
        found.fold_into(conv, norm=nn.BatchNorm2d(5))
    assert error.value.problem == "a norm of 5 channels takes up no constant of 3."
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize("budget", [True, -1, "few", math.nan, math.inf])
def test_what_is_no_number_of_channels_is_refused(budget: object) -> None:
    with pytest.raises(OTPruneError) as error:
        SparseMap(budget=budget)  # type: ignore[arg-type]
    assert "is no number of channels" in error.value.problem
    assert error.value.fix == "write a whole number of channels, or a share up to 1.0."
