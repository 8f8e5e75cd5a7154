"""Choosing and fitting single weights: exact answers, laws, and agreement with other solvers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune.criteria.weights import (
    ALPS,
    Magnitude,
    NetTrim,
    Samples,
    SparseGPT,
    Thinned,
    Wanda,
    WeightCase,
    WeightCriterion,
)
from torch_otprune.criteria.weights.base import largest
from torch_otprune.criteria.weights.refit import damped, off, refit, towards
from torch_otprune.criteria.weights.trim import Program, Solved, behind, solve
from torch_otprune.errors import CalibrationError, PolicyError
from torch_otprune.policy import Pattern

FREE, TWO_FOUR = Pattern(), Pattern(2, 4)
ALL: list[WeightCriterion] = [
    Magnitude(),
    Magnitude(refit=True),
    Wanda(),
    Wanda(refit=True),
    SparseGPT(block=4),
    ALPS(),
    NetTrim(),
    NetTrim(mode="parallel"),
]
NAMES = [f"{c.kind}{'-refit' if getattr(c, 'refit', 0) else ''}-{c.reads}" for c in ALL]
each = pytest.mark.parametrize("criterion", ALL, ids=NAMES)


def problem(
    rows: int = 60, width: int = 8, out: int = 6, groups: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, rows, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, out, width, generator=generator, dtype=torch.float64)
    return x @ mix, weight


def case(
    x: Tensor, weight: Tensor, amount: int | None, pattern: Pattern = FREE, *, relu: bool = True
) -> WeightCase:
    second = x.mT @ x / x.shape[1]
    y = x @ weight.mT
    active = y > 0 if relu else torch.ones_like(y, dtype=torch.bool)
    told = Samples(
        x, y, active, torch.zeros_like(y), y, torch.ones_like(weight[:, :, 0]), shifts=False
    )
    power = second.diagonal(dim1=1, dim2=2)
    return WeightCase(
        "layer", weight, weight, second, power, amount, pattern, x.shape[1], samples=told
    )


def cost(found: Thinned, told: WeightCase) -> float:
    assert told.second is not None
    return float(off(found.weight, told.weight, told.second).sum())


def program(seed: int = 0, *, share: float = 0.2, free: bool = False, groups: int = 1) -> Program:
    x, weight = problem(rows=12, width=5, out=3, groups=groups, seed=seed)
    if free:
        x[:, :, -1] = 1
    y = x @ weight.mT
    active = y > 0
    target = y * active
    radius = share * target.square().sum((1, 2), keepdim=True).sqrt()
    return Program(x, target, active, torch.zeros_like(y), radius, free)


@each
def test_no_more_weights_stay_than_asked(criterion: WeightCriterion) -> None:
    x, weight = problem()
    found = criterion.thin(case(x, weight, 24)).weight
    assert found.shape == weight.shape and int((found != 0).sum()) <= 24


@each
@given(st.sampled_from([Pattern(1, 2), Pattern(2, 4), Pattern(1, 4), Pattern(3, 4)]))
@settings(max_examples=4, deadline=None)
def test_a_pattern_holds_in_every_block(criterion: WeightCriterion, pattern: Pattern) -> None:
    x, weight = problem()
    amount = weight.numel() * pattern.n // pattern.m
    found = criterion.thin(case(x, weight, amount, pattern)).weight
    assert int((found != 0).view(-1, pattern.m).sum(1).max()) <= pattern.n


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda()])
def test_a_criterion_that_masks_leaves_what_stays_as_it_is(criterion: WeightCriterion) -> None:
    x, weight = problem()
    found = criterion.thin(case(x, weight, 24)).weight
    assert torch.equal(found, weight * (found != 0))


def test_magnitude_keeps_the_largest() -> None:
    weight = torch.tensor([[[3.0, -1.0, 2.0, -4.0]]], dtype=torch.float64)
    found = Magnitude().thin(WeightCase("l", weight, weight, None, None, 2, FREE))
    assert found.weight.tolist() == [[[3.0, 0.0, 0.0, -4.0]]]


def test_wanda_weighs_by_the_input_and_keeps_equally_many_of_every_output() -> None:
    weight = torch.tensor([[[3.0, 1.0], [5.0, 1.0]]], dtype=torch.float64)
    second = torch.diag_embed(torch.tensor([[1.0, 100.0]], dtype=torch.float64))
    told = WeightCase("l", weight, weight, second, second.diagonal(dim1=1, dim2=2), 2, FREE)
    assert Wanda().thin(told).weight.tolist() == [[[0.0, 1.0], [0.0, 1.0]]]


@pytest.mark.parametrize("criterion", ALL[:-2], ids=NAMES[:-2])
def test_all_weights_stay_where_all_may(criterion: WeightCriterion) -> None:
    x, weight = problem()
    found = criterion.thin(case(x, weight, weight.numel()))
    torch.testing.assert_close(found.weight, weight, atol=1e-6, rtol=1e-6)


def test_the_refit_is_least_squares_on_every_output_of_its_own() -> None:
    x, weight = problem()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    second = x.mT @ x
    found = refit(mask, second, weight @ second, torch.zeros_like(weight), steps=500)
    for row in range(weight.shape[1]):
        kept = mask[0, row]
        y = x[0] @ weight[0, row]
        exact = torch.linalg.lstsq(x[0][:, kept], y[:, None]).solution[:, 0]
        torch.testing.assert_close(found[0, row, kept], exact, atol=1e-7, rtol=1e-7)
        assert not found[0, row, ~kept].any()


def test_a_refit_of_magnitude_and_wanda_beats_the_mask_alone() -> None:
    x, weight = problem(width=16, out=12)
    told = case(x, weight, 96)
    for kind in (Magnitude, Wanda):
        assert cost(kind(refit=True).thin(told), told) < 0.8 * cost(kind().thin(told), told)


@pytest.mark.parametrize("amount", [24, 48, 96, 144])
@pytest.mark.parametrize("pattern", [FREE, TWO_FOUR])
def test_alps_is_never_behind_refitted_carry(amount: int, pattern: Pattern) -> None:
    x, weight = problem(width=16, out=12)
    told = case(x, weight, amount if pattern.free else 96, pattern)
    assert told.second is not None
    lifted, _ = damped(told.second, 1e-2)
    size = lifted.diagonal(dim1=1, dim2=2).sqrt()[:, None]
    assert told.amount is not None
    mask = largest((weight * size).abs(), told.amount, pattern, where="l")
    other = towards(mask, weight, told.second, 1e-2)
    found = ALPS(steps=500).thin(told).weight
    ours, theirs = (float(off(w, weight, lifted).sum()) for w in (found, other))
    assert ours <= theirs * (1 + 1e-6)


def test_alps_beats_sparsegpt_beats_wanda_on_inputs_that_say_alike() -> None:
    x, weight = problem(rows=400, width=32, out=24)
    told = case(x, weight, 32 * 24 * 3 // 10)
    wanda, gpt, alps = (cost(c.thin(told), told) for c in (Wanda(), SparseGPT(), ALPS()))
    assert alps < gpt < wanda


def test_sparsegpt_in_one_column_blocks_is_the_textbook_elimination() -> None:
    """Drop the last column only: the rest cannot make up for it, as the sweep goes forward."""
    x, weight = problem(width=4, out=1)
    second = x.mT @ x / x.shape[1]
    told = case(x, weight, 3)
    found = SparseGPT(block=4, damping=1e-9).thin(told).weight[0, 0]
    gone = int((found == 0).nonzero())
    later = list(range(gone + 1, 4))
    step = torch.zeros(4, dtype=torch.float64)
    h = second[0]
    if later:  # the best that later columns can do, given that this weight is gone
        step[later] = torch.linalg.solve(h[later][:, later], h[later, gone] * weight[0, 0, gone])
    expected = weight[0, 0] + step
    expected[gone] = 0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("criterion", [ALPS(), SparseGPT(), Wanda(refit=True)])
def test_an_input_that_is_always_zero_gets_no_weight_and_breaks_nothing(
    criterion: WeightCriterion,
) -> None:
    x, weight = problem()
    x[:, :, 2] = 0
    found = criterion.thin(case(x, weight, 30)).weight
    assert torch.isfinite(found).all() and not found[:, :, 2].any()


@each
def test_fewer_rows_than_inputs_give_finite_weights(criterion: WeightCriterion) -> None:
    x, weight = problem(rows=4)
    assert torch.isfinite(criterion.thin(case(x, weight, 24)).weight).all()


def test_net_trim_says_that_rows_are_too_few() -> None:
    x, weight = problem(rows=4)
    assert "only 4 rows for 8 inputs" in NetTrim().thin(case(x, weight, 24)).note


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda(), SparseGPT(), ALPS()])
def test_a_score_that_is_no_number_names_the_layer(criterion: WeightCriterion) -> None:
    x, weight = problem()
    weight[0, 1, 3] = torch.nan
    with pytest.raises(CalibrationError, match=r"weight .* scored nan") as error:
        criterion.thin(case(x, weight, 24))
    assert "layer 'layer'" in str(error.value)


def test_rows_of_zeros_stay_rows_of_zeros() -> None:
    x, weight = problem()
    weight[0, 2] = 0
    for criterion in ALL:
        found = criterion.thin(case(x, weight, 20)).weight
        assert torch.isfinite(found).all()
        assert float(found[0, 2].abs().max()) < 1e-9


def slsqp(p: Program) -> tuple[float, Tensor]:
    """Solve the same program by a generic solver, with weights as differences of positives."""
    from scipy.optimize import minimize

    x, y, on = (t[0].numpy() for t in (p.x, p.target, p.active))
    shape, radius = (x.shape[1], y.shape[1]), float(p.radius)
    size = shape[0] * shape[1]
    paid = np.ones(shape)
    if p.free:
        paid[-1] = 0

    def weight(z: np.ndarray) -> np.ndarray:
        return (z[:size] - z[size:]).reshape(shape)

    limits = (
        {"type": "ineq", "fun": lambda z: radius**2 - ((x @ weight(z) - y)[on] ** 2).sum()},
        {"type": "ineq", "fun": lambda z: -(x @ weight(z))[~on]},
    )
    start = np.linalg.lstsq(x, y, rcond=None)[0].ravel()
    made = minimize(
        lambda z: float(((z[:size] + z[size:]).reshape(shape) * paid).sum()),
        np.concatenate([start.clip(min=0), (-start).clip(min=0)]),
        bounds=[(0, None)] * (2 * size),
        constraints=limits,
        method="SLSQP",
        options={"maxiter": 3000, "ftol": 1e-12},
    )
    return float(made.fun), torch.from_numpy(weight(made.x))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_convex_program_agrees_with_slsqp(share: float, free: bool) -> None:
    p = program(share=share, free=free)
    found = solve(p, rounds=20000, tolerance=1e-10)
    value, weight = slsqp(p)
    assert abs(float(p.norm(found.weight)) - value) < 1e-5 * value
    torch.testing.assert_close(found.weight[0], weight, atol=1e-4, rtol=1e-4)


def multiplier(p: Program, found: Solved) -> Tensor:
    dual = found.state.penalty * found.state.pull
    return torch.where(p.active, dual, dual.clamp_max(0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_solution_meets_the_conditions_of_kkt(seed: int) -> None:
    p = program(seed=seed)
    found = solve(p, rounds=30000, tolerance=1e-11)
    near, over = behind(p, found.weight)
    assert abs(float(near.norm() / p.radius) - 1) < 1e-6  # the radius is used up
    assert float(over.max()) < 1e-6
    scale = 0.3 * float(p.x.square().sum(1).max().sqrt())
    dual = multiplier(p, found) / scale  # of the problem as it was given
    slopes = (p.x.mT @ dual)[0]
    used = found.weight[0] != 0
    torch.testing.assert_close(slopes[used], found.weight[0][used].sign(), atol=1e-5, rtol=1e-5)
    assert float(slopes.abs().max()) < 1 + 1e-5
    slack = (p.x @ found.weight)[~p.active]
    assert float((dual[~p.active] * slack).abs().max()) < 1e-5  # one of the two is zero


@given(st.integers(0, 30), st.floats(0.05, 0.6))
@settings(max_examples=12, deadline=None)
def test_the_gap_bounds_what_is_left_to_gain(seed: int, share: float) -> None:
    p = program(seed=seed, share=share)
    rough, exact = solve(p, rounds=60), solve(p, rounds=20000, tolerance=1e-10)
    least = float(p.norm(exact.weight))
    assert float(exact.gap) < 1e-4
    assert float(p.norm(rough.weight)) * (1 - float(rough.gap)) <= least * (1 + 1e-6)


def test_problems_side_by_side_are_solved_as_one_by_one() -> None:
    p = program(groups=4)
    whole = solve(p, rounds=3000, tolerance=1e-8)
    for g in range(4):
        own = Program(*(t[g : g + 1] for t in (p.x, p.target, p.active, p.roof, p.radius)))
        alone = solve(own, rounds=3000, tolerance=1e-8)
        torch.testing.assert_close(whole.weight[g], alone.weight[0], atol=1e-12, rtol=1e-12)


def test_outputs_with_radii_of_their_own_are_solved_as_one_by_one() -> None:
    p = program()
    radius = 0.2 * p.target.square().sum(1, keepdim=True).sqrt()
    whole = solve(Program(p.x, p.target, p.active, p.roof, radius), rounds=4000, tolerance=1e-8)
    for m in range(3):
        parts = (t[:, :, m : m + 1] for t in (p.target, p.active, p.roof, radius))
        alone = solve(Program(p.x, *parts), rounds=4000, tolerance=1e-8)
        torch.testing.assert_close(
            whole.weight[:, :, m], alone.weight[:, :, 0], atol=1e-10, rtol=1e-10
        )


def test_groups_of_a_refit_do_not_see_each_other() -> None:
    x, weight = problem(groups=2)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    second = x.mT @ x
    both = refit(mask, second, weight @ second, weight)
    for g in range(2):
        part = (t[g : g + 1] for t in (mask, second, weight @ second, weight))
        torch.testing.assert_close(both[g : g + 1], refit(*part))


@pytest.mark.parametrize("refits", [True, False])
def test_a_solver_that_stops_outside_of_its_radius_leaves_all_weights_and_says_so(
    refits: bool,
) -> None:
    x, weight = problem(rows=80)
    found = NetTrim(w2=1e-3, rounds=1, refit=refits).thin(case(x, weight, None))
    assert found.certificate is not None
    assert "so all weights stay; raise rounds" in found.note
    assert found.certificate.spent <= found.certificate.radius
    torch.testing.assert_close(found.weight, weight)


def _eliminated(
    weight: Tensor, second: Tensor, amount: int, pattern: Pattern, *, block: int
) -> Tensor:
    """Sweep as the paper says, with the inverse of what is left taken anew at every input."""
    weight, width = weight.clone(), weight.shape[1]
    mask = torch.ones_like(weight, dtype=torch.bool)
    step = block if pattern.free else pattern.m
    for j in range(width):
        rest = torch.linalg.inv(second[j:, j:])
        if j % step == 0:
            end = min(j + step, width)
            left = [torch.linalg.inv(second[i:, i:])[0, 0] for i in range(j, end)]
            score = weight[:, j:end].square() / torch.stack(left)
            rows, count = score, pattern.n
            if pattern.free:
                rows, count = score.reshape(1, -1), amount * end // width - amount * j // width
            chosen = rows.topk(count, dim=1).indices
            marked = torch.zeros_like(rows, dtype=torch.bool).scatter(1, chosen, value=True)
            mask[:, j:end] = marked.view(score.shape)
        lost = weight[:, j] * ~mask[:, j] / rest[0, 0]
        weight[:, j:] -= torch.outer(lost, rest[0])
    return weight * mask


@pytest.mark.parametrize("pattern", [FREE, TWO_FOUR])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_sparsegpt_agrees_with_an_elimination_that_inverts_anew(
    pattern: Pattern, block: int
) -> None:
    x, weight = problem(rows=60, width=16, out=5, seed=4)
    told = case(x, weight, 40, pattern)
    assert told.second is not None
    lifted, _ = damped(told.second, 1e-2)
    expected = _eliminated(weight[0], lifted[0], 40, pattern, block=block)
    found = SparseGPT(block=block).thin(told).weight[0]
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


def test_alps_is_near_the_best_of_all_supports() -> None:
    """Every support of three in seven is tried; the search promises none, and finds most."""
    from itertools import combinations

    found = []
    for seed in range(6):
        x, weight = problem(width=7, out=1, seed=seed)
        told = case(x, weight, 3)
        assert told.second is not None
        lifted, _ = damped(told.second, 1e-2)
        costs = []
        for chosen in combinations(range(7), 3):
            mask = torch.zeros_like(weight, dtype=torch.bool)
            mask[..., list(chosen)] = True
            tried = refit(mask, lifted, weight @ lifted, weight)
            costs.append(float(off(tried, weight, lifted).sum()))
        ours = float(off(ALPS().thin(told).weight, weight, lifted).sum())
        found.append(ours / min(costs))
    assert min(found) > 1 - 1e-6
    assert sum(ratio < 1 + 1e-6 for ratio in found) >= 3


def test_a_radius_of_almost_nothing_gives_the_dense_answers() -> None:
    x, weight = problem()
    found = NetTrim(radius=1e-6, tolerance=1e-9, rounds=20000, damping=1e-12).thin(
        case(x, weight, None)
    )
    ours, dense = ((x @ w.mT).relu() for w in (found.weight, weight))
    torch.testing.assert_close(ours, dense, atol=1e-4, rtol=0)


@pytest.mark.parametrize("refits", [True, False])
@pytest.mark.parametrize("per_neuron", [True, False])
@pytest.mark.parametrize("w2", [0.1, 0.5, 2.0])
def test_a_declared_w2_is_kept(w2: float, per_neuron: bool, refits: bool) -> None:
    x, weight = problem(rows=80)
    told = case(x, weight, None)
    setting = NetTrim(w2=w2, per_neuron=per_neuron, refit=refits, tolerance=1e-7, rounds=5000)
    found = setting.thin(told)
    far = ((x @ found.weight.mT).relu() - (x @ weight.mT).relu()).square().sum() / 80
    assert found.certificate is not None
    assert float(far.sqrt()) <= found.certificate.spent + 1e-9 <= w2 * (1 + 1e-3)
    assert w2 < 0.5 or (found.weight == 0).any()


def test_w2_of_the_answers_is_below_their_paired_distance() -> None:
    from scipy.optimize import linear_sum_assignment

    x, weight = problem(rows=40)
    found = NetTrim(w2=1.0).thin(case(x, weight, None))
    a, b = (x @ weight.mT).relu()[0], (x @ found.weight.mT).relu()[0]
    price = torch.cdist(a, b).square().numpy()
    exact = float(np.sqrt(price[linear_sum_assignment(price)].mean()))
    assert found.certificate is not None
    assert exact <= found.certificate.spent + 1e-9 <= 1.001


def test_the_rectifier_lets_more_weights_go_within_one_radius() -> None:
    x, weight = problem(rows=120, width=16, out=16)
    setting = NetTrim(w2=1.0, tolerance=1e-6, rounds=4000, refit=False)
    bent, straight = (
        setting.thin(case(x, weight, None, relu=relu)).weight for relu in (True, False)
    )
    assert int((bent != 0).sum()) < int((straight != 0).sum())


def test_a_radius_that_no_weight_keeps_names_the_layer_and_the_least_one() -> None:
    x, weight = problem()
    told = case(x, weight, None)
    assert told.samples is not None
    moved = Samples(
        x.roll(1, dims=1),
        *(getattr(told.samples, n) for n in ("target", "active", "roof")),
        x.roll(1, dims=1) @ weight.mT,
        told.samples.scale,
        shifts=False,
    )
    broken = WeightCase(
        "fc2", weight, weight, told.second, told.power, None, FREE, told.rows, samples=moved
    )
    for setting, fix in (
        (NetTrim(w2=0.01), "give a w2 of at least"),
        (NetTrim(radius=0.01, gamma=0.01), "raise gamma to 1 or more"),
    ):
        with pytest.raises(CalibrationError, match="no weight keeps the answers of 'fc2'") as error:
            setting.thin(broken)
        assert "is the least" in error.value.problem and fix in error.value.fix


def test_two_radii_at_once_are_refused() -> None:
    with pytest.raises(PolicyError, match="w2 and radius say the same thing twice"):
        NetTrim(w2=1.0, radius=0.1)


@pytest.mark.parametrize("bad", [{"w2": 0}, {"w2": -1.0}, {"radius": 1.5}, {"gamma": 0}])
def test_a_radius_that_makes_no_sense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match="no valid"):
        NetTrim(**bad)  # type: ignore[arg-type]
