"""Claims about entropic transport: oracles, agreement between solvers, gradients, honesty."""

from __future__ import annotations

import itertools
import math

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune import transport
from torch_otprune.errors import TransportError

D = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, n: int) -> Tensor:
    w = torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.01
    return w / w.sum()


@pytest.mark.parametrize("eps", [0.5, 0.05, 0.01])
def test_a_converged_plan_is_the_one_pot_finds(eps: float) -> None:
    cost, a, b = transport.sqdist(draw(0, 30, 2), draw(1, 20, 2)), weights(2, 30), weights(3, 20)
    got = transport.coupling(cost, a, b, eps=eps, tol=1e-12, limit=50_000).plan()
    want = ot.sinkhorn(
        a.numpy(), b.numpy(), cost.numpy(), eps * float(cost.mean()),
        method="sinkhorn_log", numItermax=50_000, stopThr=1e-13,
    )  # fmt: skip
    torch.testing.assert_close(got, torch.from_numpy(want), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("relax", [(0.5, 0.5), (math.inf, 0.3), (2.0, math.inf)])
def test_relaxed_marginals_agree_with_pot(relax: tuple[float, float]) -> None:
    cost = transport.sqdist(draw(0, 15, 2), draw(1, 12, 2))
    a, b = weights(2, 15), 1.7 * weights(3, 12)
    mean = float(cost.mean())
    got = transport.coupling(cost, a, b, eps=0.1, relax=relax, tol=1e-11, limit=20_000).plan()
    want = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), cost.numpy(), 0.1 * mean, [r * mean for r in relax],
        reg_type="kl", numItermax=20_000, stopThr=1e-13,
    )  # fmt: skip
    torch.testing.assert_close(got, torch.from_numpy(want), atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["scaling", "blocks"])
def test_solvers_agree_on_one_plan(solver: str, p: float) -> None:
    x, y = draw(4, 60, 3), draw(5, 50, 3) + 1
    want = transport.coupling_points(x, y, p=p, eps=0.05, solver="scaling", tol=1e-10).plan()
    got = transport.coupling_points(x, y, p=p, eps=0.05, solver=solver, tol=1e-10).plan()
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-5)


def test_a_batch_of_problems_is_solved_as_each_alone() -> None:
    costs = torch.rand(20, 8, 6, dtype=D, generator=torch.Generator().manual_seed(0))
    together = transport.couplings(costs, eps=0.05, tol=1e-10)
    for cost, found in zip(costs, together, strict=True):
        alone = transport.coupling(cost, eps=0.05, tol=1e-10)
        torch.testing.assert_close(found.plan(), alone.plan(), atol=1e-8, rtol=0)


def test_small_temperatures_approach_the_exact_cost_within_one_percent() -> None:
    x, y = draw(6, 80, 4), draw(7, 80, 4) + 0.5
    exact = transport.coupling_points(x, y, eps=0).cost
    soft = transport.coupling_points(x, y, eps=0.003, limit=20_000)
    assert exact <= soft.cost * (1 + 2e-3)
    assert soft.cost == pytest.approx(exact, rel=0.01)


def test_scalings_that_overflow_are_taken_over_by_the_log_domain() -> None:
    cost = transport.sqdist(draw(8, 20, 1), draw(9, 20, 1) + 50).float()
    found = transport.coupling(cost, eps=1e-4, limit=20_000, tol=5e-3)
    assert found.marginal_error <= 0.01
    assert bool(found.plan().isfinite().all())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), m=st.integers(1, 12))
def test_a_rounded_plan_meets_both_marginals(seed: int, n: int, m: int) -> None:
    cost = transport.sqdist(draw(seed, n, 2), draw(seed + 1, m, 2))
    found = transport.coupling(cost, weights(seed, n), weights(seed + 1, m), eps=0.1)
    plan = found.feasible()
    assert float(plan.min()) >= 0
    torch.testing.assert_close(plan.sum(1), found.a, atol=1e-12, rtol=0)
    torch.testing.assert_close(plan.sum(0), found.b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_applying_a_coupling_is_multiplying_with_its_plan(eps: float) -> None:
    found = transport.coupling_points(draw(0, 15, 2), draw(1, 10, 2), eps=eps)
    values = draw(2, 10, 3)
    torch.testing.assert_close(found.apply(values), found.plan() @ values)
    torch.testing.assert_close(found.apply(values[:, 0]), found.plan() @ values[:, 0])
    mean = found.plan() @ values / found.plan().sum(1, keepdim=True)
    torch.testing.assert_close(found.barycentric_map(values), mean)


def test_permuting_the_points_permutes_the_plan() -> None:
    x, y, order = draw(3, 20, 2), draw(4, 20, 2), torch.randperm(20)
    one = transport.coupling_points(x, y, eps=0.1, tol=1e-10).plan()
    two = transport.coupling_points(x[order], y, eps=0.1, tol=1e-10).plan()
    torch.testing.assert_close(two, one[order], atol=1e-9, rtol=0)


@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_the_frozen_plan_gives_the_derivative_of_the_optimal_value(eps: float) -> None:
    cost, way = transport.sqdist(draw(5, 8, 2), draw(6, 8, 2)), draw(7, 8, 8)
    live = cost.clone().requires_grad_()
    found = transport.coupling(cost, eps=eps, tol=1e-13, limit=50_000)
    (slope,) = torch.autograd.grad(found.cost_of(live), live)
    heat, h = eps * float(cost.mean()), 1e-5

    def value(shift: float) -> float:
        moved = cost + shift * way
        if eps == 0:
            return transport.coupling(moved, eps=0).cost
        relative = heat / float(moved.mean())
        f, g = transport.coupling(moved, eps=relative, tol=1e-13, limit=50_000).potentials
        return float(f.mean() + g.mean())

    numeric = (value(h) - value(-h)) / (2 * h)
    assert float((slope * way).sum()) == pytest.approx(numeric, rel=1e-5)


def test_a_plan_with_misplaced_mass_is_refused() -> None:
    cost = transport.sqdist(draw(8, 40, 2), draw(9, 40, 2))
    with pytest.raises(TransportError, match=r"% of the mass in the wrong place"):
        transport.coupling(cost, eps=1e-4, limit=2)


def test_an_unknown_solver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TransportError, match="there is no solver 'magic'"):
        transport.coupling(torch.ones(2, 2), solver="magic")


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(TransportError, match="eps is -1"):
        transport.coupling(torch.ones(2, 2), eps=-1.0)


@pytest.mark.parametrize(
    ("solver", "p"), [*itertools.product(["scaling", "geomloss", "blocks"], [1.0, 2.0])]
)
def test_every_solver_finds_the_same_divergence(solver: str, p: float) -> None:
    x, y = draw(10, 80, 3), draw(11, 70, 3) * 1.3 + 0.4
    want = transport.divergence(x, y, p=p, solver="scaling")
    got = transport.divergence_report(x, y, p=p, solver=solver)
    assert got.solver == solver
    assert float(got.distance) == pytest.approx(float(want), rel=2e-3)


def test_the_divergence_is_half_of_what_geomloss_squares() -> None:
    import geomloss

    x, y = draw(12, 90, 2), draw(13, 90, 2) + 0.7
    blur = math.sqrt(0.02 * float(transport.sqdist(x, y).mean()) / 2)
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.98, backend="tensorized")
    want = math.sqrt(2 * float(loss(x, y)))
    assert float(transport.divergence(x, y)) == pytest.approx(want, rel=2e-3)


def test_equal_clouds_are_at_distance_zero_and_swapping_changes_nothing() -> None:
    x, y = draw(14, 40, 3), draw(15, 30, 3)
    assert float(transport.divergence(x, x.clone())) < 1e-3 * float(transport.divergence(x, y))
    assert float(transport.divergence(x, y)) == pytest.approx(
        float(transport.divergence(y, x)), rel=1e-3
    )


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_the_gradient_of_the_divergence_matches_finite_differences(p: float) -> None:
    x, y, way = draw(16, 12, 2), draw(17, 9, 2) + 0.3, draw(18, 12, 2)
    heat = 0.1 * transport.coupling_points(x, y, p=p, eps=1.0).geometry.mean()

    def value(points: Tensor) -> Tensor:  # the temperature follows the data: hold it still
        mean = transport.coupling_points(points.detach(), y, p=p, eps=1.0).geometry.mean()
        return transport.divergence(points, y, p=p, eps=heat / mean, solver="scaling")

    live = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(live), live)
    h = 1e-3
    numeric = float(value(x + h * way) - value(x - h * way)) / (2 * h)
    assert float((slope * way).sum()) == pytest.approx(numeric, rel=5e-3)


def test_the_divergence_leaves_grad_mode_alone() -> None:
    x, y = draw(19, 10, 2), draw(20, 10, 2)
    with torch.no_grad():
        transport.divergence(x, y, solver="geomloss")
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert math.isfinite(float(transport.divergence(x, y, solver="geomloss")))


def test_a_reduction_of_dimension_says_what_it_left_out() -> None:
    x = draw(21, 50, 20) * torch.linspace(3, 0.1, 20, dtype=D)
    found = transport.coupling_points(x, x + 1, dims=5)
    pooled = torch.cat([x, x + 1])
    spread = torch.linalg.eigvalsh(torch.cov(pooled.T))
    assert found.left_out == pytest.approx(float(spread[:-5].sum() / spread.sum()), rel=1e-9)


def test_the_table_says_what_it_passed_over() -> None:
    words = transport.explain(10**6, d=1)
    assert words.startswith("line: sorting is exact")
    words = transport.coupling_points(draw(0, 9, 2), draw(1, 9, 2), eps=0.1, explain=True).why
    assert "not exact: needs hard marginals" in words


def test_an_exact_plan_with_a_soft_marginal_is_refused() -> None:
    with pytest.raises(TransportError, match="eps=0 with a relaxed marginal has no exact solver"):
        transport.coupling(torch.ones(2, 2), eps=0.0, relax=(1.0, 1.0))


def test_costs_below_zero_are_coupled_like_any_other() -> None:
    cost = transport.sqdist(draw(22, 12, 2), draw(23, 10, 2))
    for eps in (0.0, 0.1):
        up = transport.coupling(cost, eps=eps * 10, tol=1e-9)
        relative = eps * 10 * float(cost.mean()) / float((cost - 50).abs().mean())
        down = transport.coupling(cost - 50, eps=relative, tol=1e-9)
        torch.testing.assert_close(up.plan(), down.plan(), atol=1e-7, rtol=0)


def test_a_divergence_by_an_unknown_solver_is_refused() -> None:
    with pytest.raises(TransportError, match="there is no solver 'magic'"):
        transport.divergence(draw(0, 4, 2), draw(1, 4, 2), solver="magic")


def test_geomloss_is_refused_for_other_orders() -> None:
    with pytest.raises(TransportError, match="geomloss knows p=1 and p=2, not 3"):
        transport.divergence(draw(0, 4, 2), draw(1, 4, 2), p=3.0, solver="geomloss")


def test_a_divergence_without_temperature_is_refused() -> None:
    with pytest.raises(TransportError, match=r"eps is 0\.0"):
        transport.divergence(draw(0, 4, 2), draw(1, 4, 2), eps=0.0)
