"""Claims about exact transport: lines, assignments, linear programs, and clear refusals."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune import transport
from torch_otprune.errors import TransportError
from torch_otprune.transport.checks import same_space

D = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, n: int) -> Tensor:
    w = torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.01
    return w / w.sum()


def emd(cost: Tensor, a: Tensor, b: Tensor) -> float:
    return float(ot.emd2(a.numpy(), b.numpy(), cost.numpy(), numItermax=10**7))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_a_shifted_column_is_exactly_the_shift_away(p: float) -> None:
    x = draw(0, 64, 1)
    distance = transport.pairwise_1d(torch.cat([x, x + 3.0], dim=1), p=p)
    torch.testing.assert_close(distance, torch.tensor([[0.0, 3.0], [3.0, 0.0]], dtype=D))


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_channel_laws_agree_with_pot(p: float) -> None:
    x = draw(1, 50, 4)
    got = transport.pairwise_1d(x, p=p)
    want = ot.wasserstein_1d(x[:, 0].numpy(), x[:, 3].numpy(), p=p) ** (1 / p)
    assert float(got[0, 3]) == pytest.approx(want, rel=1e-12)


def test_channels_that_nearly_coincide_keep_their_digits_in_float32() -> None:
    x = draw(2, 1000, 12)
    near = torch.cat([x, x + 1e-4 * draw(3, 1000, 12)], dim=1) + 100
    want = transport.pairwise_1d(near)
    got = transport.pairwise_1d(near.float())
    # An offset of 100 leaves 8e-6 of resolution in each float32 value.
    assert float((got - want).abs().max()) < 2e-5


def test_the_line_agrees_with_scipy_for_weights_and_unequal_sizes() -> None:
    x, y, a, b = draw(4, 30, 1), draw(5, 17, 1), weights(6, 30), weights(7, 17)
    got = transport.wasserstein_1d(x, y, a, b, p=1)
    want = scipy.stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy(), a.numpy(), b.numpy())
    assert float(got) == pytest.approx(want, rel=1e-12)


def test_gradients_on_the_line_match_finite_differences() -> None:
    x, y = draw(8, 7, 2).requires_grad_(), draw(9, 5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: transport.wasserstein_1d(s, t, p=2), (x, y))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.sampled_from([1.0, 2.0, 3.0]), n=st.integers(1, 9))
def test_channel_laws_form_a_metric(seed: int, p: float, n: int) -> None:
    d = transport.pairwise_1d(draw(seed, n, 4), p=p)
    torch.testing.assert_close(d, d.T)
    assert float(d.diagonal().abs().max()) == 0
    assert bool((d[:, None, :] <= d[:, :, None] + d[None] + 1e-9).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_scaling_the_points_scales_every_distance(seed: int, scale: float) -> None:
    x, y = draw(seed, 12, 3), draw(seed + 1, 9, 3)
    for verb in (_exact, transport.wasserstein, transport.sliced, transport.divergence):
        one, two = verb(x, y), verb(scale * x, scale * y)
        assert float(two) == pytest.approx(scale * float(one), rel=1e-5)


def _exact(x: Tensor, y: Tensor) -> float:
    return transport.coupling_points(x, y, eps=0).cost ** 0.5


@pytest.mark.parametrize(("n", "m"), [(8, 8), (12, 6), (9, 7), (1, 5), (300, 300), (64, 32)])
def test_an_exact_plan_costs_what_pot_finds(n: int, m: int) -> None:
    cost = transport.sqdist(draw(n, n, 3), draw(m + 1, m, 3))
    found = transport.coupling(cost)
    assert found.exact
    assert found.cost == pytest.approx(
        emd(cost, torch.full((n,), 1 / n, dtype=D), torch.full((m,), 1 / m, dtype=D)), rel=1e-10
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), m=st.integers(1, 30))
def test_any_weights_are_coupled_exactly(seed: int, n: int, m: int) -> None:
    cost = transport.sqdist(draw(seed, n, 2), draw(seed + 1, m, 2))
    a, b = weights(seed + 2, n), weights(seed + 3, m)
    found = transport.coupling(cost, a, b, eps=0)
    assert found.cost == pytest.approx(emd(cost, a, b), rel=1e-8, abs=1e-12)
    plan = found.plan()
    torch.testing.assert_close(plan.sum(1), a, atol=1e-10, rtol=0)
    torch.testing.assert_close(plan.sum(0), b, atol=1e-10, rtol=0)


def test_a_line_is_coupled_in_sorted_order_without_a_matrix() -> None:
    x, y, a, b = draw(1, 40, 1), draw(2, 23, 1), weights(3, 40), weights(4, 23)
    found = transport.coupling_points(x, y, a, b)
    assert found.solver == "line"
    assert found.cost == pytest.approx(emd(transport.sqdist(x, y), a, b), rel=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_potentials_of_an_exact_plan_prove_it_optimal(weighted: bool) -> None:
    cost = transport.sqdist(draw(1, 40, 3), draw(2, 40, 3))
    a, b = (weights(3, 40), weights(4, 40)) if weighted else (None, None)
    found = transport.coupling(cost, a, b, eps=0)
    f, g = found.potentials
    assert float((cost - f[:, None] - g).min()) > -1e-10
    assert float((found.a * f).sum() + (found.b * g).sum()) == pytest.approx(found.cost, rel=1e-9)


def test_a_permuted_copy_is_found_again() -> None:
    x, order = draw(5, 500, 6), torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        transport.coupling_points(x, x[order]).assignment()[order], torch.arange(500)
    )


def test_a_translation_costs_its_length() -> None:
    x, shift = draw(6, 200, 4), torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=D)
    assert _exact(x, x + shift) == pytest.approx(5.0, rel=1e-12)


def test_paired_samples_are_recognised_and_cost_their_mean_square() -> None:
    x = draw(7, 300, 64)
    y = x + 0.3 * draw(8, 300, 64)
    found = transport.coupling_points(x, y)
    assert found.solver == "paired"
    assert found.cost**0.5 == pytest.approx(float(transport.paired_distance(x, y)), rel=1e-12)
    assert found.cost == pytest.approx(transport.coupling_points(x, y, eps=0, solver="exact").cost)


def test_a_free_second_marginal_sends_every_source_to_its_nearest() -> None:
    cost = transport.sqdist(draw(9, 20, 2), draw(10, 8, 2))
    found = transport.coupling(cost, relax=(math.inf, 0.0))
    assert found.cost == pytest.approx(float(cost.amin(1).mean()))
    assert torch.equal(found.assignment(), cost.argmin(1))


def test_assignment_agrees_with_scipy_and_keeps_every_column_apart() -> None:
    from scipy.optimize import linear_sum_assignment

    cost = draw(11, 9, 14)
    columns = transport.assignment(cost)
    np.testing.assert_array_equal(columns.numpy(), linear_sum_assignment(cost.numpy())[1])


def test_half_precision_is_computed_in_single() -> None:
    x = draw(12, 40, 3)
    got = transport.coupling_points(x.half(), (x + 1).half())
    assert got.geometry.like.dtype == torch.float32
    assert transport.pairwise_1d(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 3)),
        (torch.zeros(1, 2), torch.ones(1, 2)),
        (torch.ones(4, 2), torch.ones(7, 2)),
        (torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0]])),
    ],
)
def test_dead_single_and_repeated_points_have_defined_distances(x: Tensor, y: Tensor) -> None:
    for eps in (None, 0.05):
        assert math.isfinite(transport.coupling_points(x, y, eps=eps).cost)
    assert math.isfinite(float(transport.divergence(x, y)))
    assert math.isfinite(float(transport.sliced(x, y)))
    assert math.isfinite(float(transport.max_sliced(x, y).distance))
    assert math.isfinite(float(transport.gaussian_points(x, y).distance))
    assert math.isfinite(transport.flowtree(x, y).distance)


def test_points_of_no_weight_change_nothing() -> None:
    x, y = draw(13, 6, 2), draw(14, 5, 2)
    a = torch.tensor([0.0, 0.2, 0.2, 0.2, 0.2, 0.2], dtype=D)
    with_it = transport.coupling_points(x, y, a, eps=0).cost
    assert with_it == pytest.approx(transport.coupling_points(x[1:], y, eps=0).cost, rel=1e-9)
    soft = transport.coupling_points(x, y, a, eps=0.1, tol=1e-8)
    assert float(soft.plan()[0].sum()) == 0
    assert bool(soft.potentials[0].isfinite().all())


def test_not_a_number_is_refused_with_its_count() -> None:
    x = torch.tensor([[1.0], [float("nan")]])
    with pytest.raises(TransportError, match="1 of 2 entries of x are NaN or infinite"):
        transport.pairwise_1d(x)


def test_clouds_of_different_dimensions_are_refused() -> None:
    with pytest.raises(TransportError, match="points of 2 dimensions cannot be compared"):
        same_space(torch.zeros(3, 2), torch.zeros(3, 4))


def test_an_order_below_one_is_refused() -> None:
    with pytest.raises(TransportError, match="W_p needs 1 <= p"):
        transport.pairwise_1d(torch.zeros(3, 2), p=0.5)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(TransportError, match="weighs no measure of 2 points"):
        transport.coupling(torch.ones(2, 2), torch.tensor([1.5, -0.5]))


def test_unequal_totals_are_refused_under_hard_marginals() -> None:
    with pytest.raises(TransportError, match="a mass of 2 cannot become a mass of 3"):
        transport.coupling(torch.ones(2, 2), torch.ones(2), torch.full((2,), 1.5))


def test_an_empty_cloud_is_refused() -> None:
    with pytest.raises(TransportError, match="is no point cloud"):
        transport.coupling_points(torch.zeros(0, 2), torch.zeros(3, 2))


def test_a_cost_with_too_many_rows_is_refused() -> None:
    with pytest.raises(TransportError, match="has no column for every row"):
        transport.assignment(torch.zeros(3, 2))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_the_exact_distance_matches_finite_differences(
    p: float, weighted: bool
) -> None:
    x, y = draw(20, 7, 3).requires_grad_(), draw(21, 7, 3).requires_grad_()
    a, b = (weights(1, 7), weights(2, 7)) if weighted else (None, None)
    assert torch.autograd.gradcheck(lambda s, t: transport.wasserstein(s, t, a, b, p=p), (x, y))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.sampled_from([1.0, 2.0]))
def test_the_exact_distance_is_a_metric(seed: int, p: float) -> None:
    x, y, z = (draw(seed + i, 8, 2) for i in range(3))
    xy, yz, xz = (float(transport.wasserstein(*pair, p=p)) for pair in ((x, y), (y, z), (x, z)))
    assert xz <= xy + yz + 1e-9
    assert xy == pytest.approx(float(transport.wasserstein(y, x, p=p)), rel=1e-9)
