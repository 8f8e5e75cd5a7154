"""Claims about layers of one shape at once, forced solvers, and the short way for few points."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune import transport
from torch_otprune.errors import TransportError
from torch_otprune.transport import cost as costs
from torch_otprune.transport.checks import clouds
from torch_otprune.transport.exact import match
from torch_otprune.transport.layers import debiased
from torch_otprune.transport.matching import few, point_costs, root_mean_square, shortest_paths
from torch_otprune.transport.sinkhorn import scaling

D = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, *shape: int) -> Tensor:
    w = torch.rand(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.01
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_laws_of_stacked_layers_are_those_of_each(p: float) -> None:
    x = draw(0, 2, 3, 50, 7)
    got = transport.pairwise_1d(x, p=p)
    for i, j in ((0, 0), (1, 2)):
        torch.testing.assert_close(got[i, j], transport.pairwise_1d(x[i, j], p=p))


def test_stacked_channels_that_nearly_coincide_keep_their_digits_in_float32() -> None:
    x = draw(1, 3, 400, 10)
    near = torch.cat([x, x + 1e-4 * draw(2, 3, 400, 10)], dim=2)
    gap = transport.pairwise_1d(near.float()) - transport.pairwise_1d(near)
    assert float(gap.abs().max()) < 2e-6


@pytest.mark.parametrize("m", [20, 13])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_worst_directions_of_stacked_layers_are_those_of_each(m: int, p: float) -> None:
    x, y = draw(3, 5, 20, 4), draw(4, 5, m, 4) * 1.5 + 0.2
    got = transport.max_sliced(x, y, p=p)
    each = [transport.max_sliced(s, t, p=p) for s, t in zip(x, y, strict=True)]
    torch.testing.assert_close(got.distance, torch.stack([one.distance for one in each]))
    torch.testing.assert_close(got.direction, torch.stack([one.direction for one in each]))
    assert got.steps == max(one.steps for one in each)


def test_a_layer_that_did_not_change_disturbs_no_other() -> None:
    x, y = draw(5, 2, 20, 3), draw(6, 2, 20, 3)
    y[0] = x[0]
    got = transport.max_sliced(x, y).distance
    assert float(got[0]) == 0
    torch.testing.assert_close(got[1], transport.max_sliced(x[1], y[1]).distance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_the_divergence_of_stacked_layers_is_that_of_each(p: float, weighted: bool) -> None:
    x, y = draw(7, 4, 18, 3), draw(8, 4, 15, 3) * 1.3 + 0.4
    a, b = (weights(9, 4, 18), weights(10, 4, 15)) if weighted else (None, None)
    got = transport.divergence(x, y, a, b, p=p)
    for i in range(4):
        one = (x[i], y[i], a[i], b[i]) if a is not None and b is not None else (x[i], y[i])
        assert float(got[i]) == pytest.approx(float(transport.divergence(*one, p=p)), rel=1e-3)


def test_layers_too_large_for_one_product_are_measured_one_by_one() -> None:
    x, y = draw(11, 2, 300, 3), draw(12, 2, 300, 3) + 1
    want = torch.stack([transport.divergence(s, t) for s, t in zip(x, y, strict=True)])
    torch.testing.assert_close(transport.divergence(x, y), want)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_the_gradient_of_stacked_divergences_is_that_of_each(p: float) -> None:
    x, y = draw(13, 3, 12, 2).requires_grad_(), draw(14, 3, 9, 2).requires_grad_()
    every = torch.autograd.grad(transport.divergence(x, y, p=p).sum(), (x, y))
    alone = sum(transport.divergence(s, t, p=p) for s, t in zip(x, y, strict=True))
    assert isinstance(alone, Tensor)
    for got, want in zip(every, torch.autograd.grad(alone, (x, y)), strict=True):
        assert float((got - want).norm() / want.norm()) < 5e-3


def test_layers_whose_mass_is_one_point_twice_are_at_distance_zero() -> None:
    x = torch.ones(2, 4, 3, dtype=D)
    y = torch.stack([x[0], x[1] + 3.0]).requires_grad_()
    got = transport.divergence(x, y)
    assert float(got[0].detach()) == 0
    assert float(got[1].detach()) == pytest.approx(27**0.5, rel=1e-6)
    got.sum().backward()
    assert y.grad is not None
    assert bool(y.grad.isfinite().all())


def test_a_kernel_that_underflows_sends_layers_back_to_be_solved_alone() -> None:
    x, y = draw(15, 2, 6, 1).float(), draw(16, 2, 6, 1).float() + 1e4
    w = torch.full((2, 6), 1 / 6)
    assert debiased(x, y, w, w, p=2.0, eps=1e-9) is None
    want = transport.wasserstein_1d(x[0], y[0])
    assert float(transport.divergence(x, y, eps=1e-9)[0]) == pytest.approx(float(want), rel=1e-6)


def test_batches_of_different_lengths_are_refused() -> None:
    with pytest.raises(TransportError, match=r"batches of shapes \(2, 5, 3\) and \(4, 5, 3\)"):
        clouds(torch.zeros(2, 5, 3), torch.zeros(4, 5, 3))


def test_an_empty_stack_of_layers_is_refused() -> None:
    with pytest.raises(TransportError, match="is no point cloud"):
        transport.pairwise_1d(torch.zeros(2, 0, 3))


def test_stacked_layers_need_a_temperature_too() -> None:
    with pytest.raises(TransportError, match=r"eps is 0\.0"):
        transport.divergence(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), eps=0.0)


@pytest.mark.parametrize("solver", ["exact", "scaling", "blocks", "geomloss"])
def test_a_distance_can_be_forced_to_a_solver(solver: str) -> None:
    x, y = draw(17, 60, 3), draw(18, 60, 3) * 1.2 + 1
    got = float(transport.wasserstein(x, y, solver=solver))
    if solver == "exact":
        assert got == pytest.approx(transport.coupling_points(x, y, eps=0).cost ** 0.5, rel=1e-12)
    else:
        assert got == pytest.approx(float(transport.divergence(x, y, solver=solver)), rel=1e-12)


def test_a_line_can_be_measured_by_assignment() -> None:
    x, y = draw(19, 40, 1), draw(20, 40, 1) + 1
    want = float(transport.wasserstein(x, y, solver="line"))
    assert float(transport.wasserstein(x, y, solver="exact")) == pytest.approx(want, rel=1e-12)


def test_an_unknown_solver_of_a_distance_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TransportError, match="there is no solver 'magic'") as caught:
        transport.wasserstein(torch.zeros(2, 2), torch.zeros(2, 2), solver="magic")
    assert "auto, line, exact, scaling, keops, geomloss, blocks" in str(caught.value)


def test_points_in_a_plane_are_on_no_line() -> None:
    with pytest.raises(TransportError, match="points of 2 dimensions are on no line"):
        transport.wasserstein(torch.zeros(2, 2), torch.zeros(2, 2), solver="line")
    with pytest.raises(TransportError, match="solver='line' needs points of one dimension"):
        transport.coupling_points(torch.zeros(2, 2), torch.zeros(2, 2), solver="line")


@pytest.mark.parametrize("asked", [{"eps": 0.1}, {"relax": (1.0, 1.0)}])
def test_an_exact_solver_is_refused_beside_what_it_cannot_do(asked: dict[str, object]) -> None:
    with pytest.raises(TransportError, match="solver='exact' is exact and has hard marginals"):
        transport.coupling(torch.ones(2, 2), solver="exact", **asked)  # type: ignore[arg-type]


def test_an_entropic_solver_is_refused_where_an_exact_plan_is_asked() -> None:
    with pytest.raises(TransportError, match="eps=0 insists on an exact plan"):
        transport.coupling(torch.ones(2, 2), solver="scaling", eps=0.0)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 40),
    d=st.sampled_from([2, 5, 30]),
    p=st.sampled_from([1.0, 2.0, 3.0]),
)
def test_the_short_way_finds_what_the_long_way_finds(seed: int, n: int, d: int, p: float) -> None:
    x, y = draw(seed, n, d), draw(seed + 1, n, d)
    short = transport.coupling_points(x, y, p=p)
    long = transport.coupling_points(x, y, p=p, eps=0)
    assert short.cost == pytest.approx(long.cost, rel=1e-10)
    torch.testing.assert_close(short.plan(), long.plan())
    assert float(transport.wasserstein(x, y, p=p)) ** p == pytest.approx(long.cost, rel=1e-9)


def test_the_short_way_says_what_the_table_says() -> None:
    x, y = draw(21, 30, 2), draw(22, 30, 2)
    short, long = (transport.coupling_points(x, y, explain=e) for e in (False, True))
    assert (short.solver, long.why.splitlines()[0]) == (long.solver, short.why)
    assert short.exact
    assert torch.equal(short.b, long.b)


def test_few_paired_points_are_still_recognised() -> None:
    x = draw(23, 30, 8)
    assert transport.coupling_points(x, x + 0.01 * draw(24, 30, 8)).solver == "paired"
    assert transport.coupling_points(x, x.clone()).solver == "paired"


def test_only_equal_numbers_of_few_points_go_the_short_way() -> None:
    assert few(torch.zeros(50, 3), torch.zeros(50, 3))
    assert not few(torch.zeros(50, 3), torch.zeros(49, 3))
    assert not few(torch.zeros(200, 3), torch.zeros(200, 3))


@pytest.mark.parametrize("n", [150, 250])
def test_few_and_many_points_are_matched_at_the_same_cost(n: int) -> None:
    x, y = draw(25, n, 4), draw(26, n, 4)
    cost = point_costs(x, y, p=2.0)
    short, long = shortest_paths(cost), match(transport.sqdist(x, y)).numpy()
    total = [float(cost[range(n), columns].sum()) for columns in (short, long)]
    assert total[0] == pytest.approx(total[1], rel=1e-12)


def test_points_that_coincide_have_a_gradient_of_zero() -> None:
    x = draw(27, 5, 2).requires_grad_()
    root_mean_square(x, x.detach(), torch.arange(5)).backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) == 0


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_costs_added_up_by_axis_are_squared_distances(d: int) -> None:
    x, y = draw(28, 300, d), draw(29, 900, d)
    assert costs.CACHE < 300 * 900
    want = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(transport.sqdist(x, y), want, rtol=1e-12, atol=1e-12)


def test_a_formed_plan_knows_its_cost() -> None:
    x, y = draw(30, 300, 3), draw(31, 200, 3)
    formed, asked = (transport.coupling_points(x, y, eps=0.05) for _ in range(2))
    plan = formed.plan()
    want = float((plan * transport.sqdist(x, y)).sum())
    assert formed.cost == pytest.approx(want, rel=1e-12)
    assert asked.cost == pytest.approx(want, rel=1e-12)


def test_overshooting_needs_fewer_iterations_than_plain_scaling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch_otprune.transport.sinkhorn import _Kernel

    cost = transport.sqdist(draw(32, 200, 1), draw(33, 200, 1) * 1.3)[None]
    w, eps = torch.full((1, 200), 1 / 200, dtype=D), 0.01 * cost.mean((1, 2))
    fast = scaling(cost, w, w, eps, tol=1e-8, limit=5000)
    monkeypatch.setattr(_Kernel, "hurry", lambda *_: None)
    plain = scaling(cost, w, w, eps, tol=1e-8, limit=5000)
    assert fast is not None
    assert plain is not None
    assert float(fast.error) <= 1e-8
    assert 2 * fast.iterations < plain.iterations
    # One constant may move from f to g.
    torch.testing.assert_close(
        fast.f[:, :, None] + fast.g[:, None], plain.f[:, :, None] + plain.g[:, None],
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_overshooting_in_the_log_domain_finds_the_same_plan_in_fewer_iterations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch_otprune.transport.sinkhorn import _Pace

    x, y = draw(34, 120, 1), draw(35, 90, 1) * 1.3
    ask = {"eps": 0.01, "solver": "blocks", "tol": 1e-8, "limit": 20_000}
    fast = transport.coupling_points(x, y, **ask)  # type: ignore[arg-type]
    monkeypatch.setattr(_Pace, "see", lambda *_: None)
    plain = transport.coupling_points(x, y, **ask)  # type: ignore[arg-type]
    assert 2 * fast.iterations < plain.iterations
    torch.testing.assert_close(fast.plan(), plain.plan(), atol=1e-8, rtol=1e-3)
    assert float((fast.plan().sum(1) - fast.a).abs().sum()) < 3e-8


def test_a_plan_that_the_log_domain_finished_in_double_is_formed_from_costs_in_single(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The room's function of this name hides the module. None: as if scaling had overflowed.
    module = sys.modules["torch_otprune.transport.couplings"]
    monkeypatch.setattr(module, "scaling", lambda *_, **__: None)
    x, y = draw(36, 80, 2).float(), draw(37, 70, 2).float() + 1
    found = transport.coupling_points(x, y, eps=0.05)
    assert found.dual is not None
    assert found.dual[0].dtype == torch.float64
    assert found.geometry.like.dtype == torch.float32
    total = float((found.plan() * transport.sqdist(x, y).double()).sum())
    assert found.cost == pytest.approx(total, rel=1e-6)
    assert found.apply(y).dtype == torch.float32
