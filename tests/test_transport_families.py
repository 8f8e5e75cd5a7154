"""Claims about sliced, Gaussian, mean and tree transport, and about estimates."""

from __future__ import annotations

import math

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune import transport
from torch_otprune.errors import TransportError
from torch_otprune.transport.estimate import paired_rows
from torch_otprune.transport.gaussian import fitting
from torch_otprune.transport.sliced import directions

D = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def spd(seed: int, d: int) -> Tensor:
    root = draw(seed, d, d)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=D)


def test_a_translation_is_seen_from_every_direction_alike() -> None:
    x, shift = draw(0, 50, 8), draw(1, 8)
    want = float(shift.norm()) / math.sqrt(8)
    assert float(transport.sliced(x, x + shift, count=64)) == pytest.approx(want, rel=1e-9)


def test_slices_agree_with_pot_direction_by_direction() -> None:
    x, y = draw(2, 40, 5), draw(3, 30, 5)
    theta = directions(5, 20)
    want = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=theta.numpy(), p=2)
    assert float(transport.sliced(x, y, count=20)) == pytest.approx(want, rel=1e-9)


def test_directions_come_in_orthogonal_groups() -> None:
    theta = directions(6, 12)
    for group in (theta[:, :6], theta[:, 6:]):
        torch.testing.assert_close(group.T @ group, torch.eye(6, dtype=D))


def test_a_batch_of_layers_is_measured_as_each_alone() -> None:
    x, y = draw(4, 3, 20, 4), draw(5, 3, 25, 4)
    want = torch.stack([transport.sliced(s, t) for s, t in zip(x, y, strict=True)])
    torch.testing.assert_close(transport.sliced(x, y), want)


def test_the_gradient_of_sliced_matches_finite_differences() -> None:
    x, y = draw(6, 9, 3).requires_grad_(), draw(7, 9, 3)
    assert torch.autograd.gradcheck(lambda s: transport.sliced(s, y, count=7), x)


@given(seed=st.integers(0, 10_000))
def test_slices_lie_below_their_maximum_and_that_below_the_whole(seed: int) -> None:
    x, y = draw(seed, 25, 4), draw(seed + 1, 25, 4) * 1.5 + 0.2
    whole = transport.coupling_points(x, y, eps=0).cost ** 0.5
    most = float(transport.max_sliced(x, y).distance)
    assert float(transport.sliced(x, y)) <= most * (1 + 1e-9)
    assert most <= whole * (1 + 1e-9)


def test_the_worst_direction_is_found_in_256_dimensions() -> None:
    x, y = draw(8, 500, 256), draw(9, 500, 256)
    y[:, 17] *= 3
    found = transport.max_sliced(x, y)
    assert abs(float(found.direction[17])) > 0.9
    theta = directions(256, 1000, seed=5)
    random = transport.wasserstein_1d(x @ theta, y @ theta)
    assert float(found.distance) > 3 * float(random.max())


@pytest.mark.parametrize("m", [30, 22])
def test_the_gradient_of_max_sliced_is_nearly_that_of_its_direction(m: int) -> None:
    x, y = draw(10, 30, 3).requires_grad_(), draw(11, m, 3) + 1
    found = transport.max_sliced(x, y)
    (slope,) = torch.autograd.grad(found.distance, x)
    frozen = transport.wasserstein_1d(x @ found.direction[:, None], y @ found.direction[:, None])
    torch.testing.assert_close(found.distance, frozen[0])
    want = torch.autograd.grad(frozen[0], x)[0]
    # At the top matchings may tie: then it is a mixture of theirs.
    assert float((slope - want).norm()) < 0.05 * float(want.norm())


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_the_plane_no_direction_is_worse_by_more_than_a_thousandth(seed: int, p: float) -> None:
    x, y = draw(seed, 15, 2), draw(seed + 50, 12, 2) * 1.3 + 0.5
    angle = torch.linspace(0, torch.pi, 20_001, dtype=torch.float64)
    every = torch.stack([angle.cos(), angle.sin()])
    most = float(transport.wasserstein_1d(x @ every, y @ every, p=p).max())
    assert float(transport.max_sliced(x, y, p=p).distance) >= most * (1 - 1e-3)


def test_features_are_as_far_apart_as_the_clouds() -> None:
    x, y = draw(12, 64, 3), draw(13, 64, 3) + 0.5
    one, two = (transport.sliced_features(c, count=16, levels=64) for c in (x, y))
    want = float(transport.sliced(x, y, count=16))
    assert float((one - two).norm()) == pytest.approx(want, rel=1e-9)


def test_the_sliced_kernel_is_positive_definite() -> None:
    clouds = [draw(i, 40, 3) * (1 + i / 10) + i / 5 for i in range(20)]
    kernel = transport.sliced_kernel(torch.stack([transport.sliced_features(c) for c in clouds]))
    assert float(torch.linalg.eigvalsh(kernel).min()) > -1e-12
    torch.testing.assert_close(kernel.diagonal(), torch.ones(20, dtype=D))


@pytest.mark.parametrize("levels", [7, 16, 40, 64])
def test_quantile_bins_keep_the_mean(levels: int) -> None:
    x = draw(14, 50, 3)
    torch.testing.assert_close(transport.quantiles(x, levels).mean(1), x.mean(0))


def test_gaussians_agree_with_pot() -> None:
    m1, m2, s1, s2 = draw(0, 6), draw(1, 6), spd(2, 6), spd(3, 6)
    found = transport.gaussian(m1, s1, m2, s2)
    want = ot.gaussian.bures_wasserstein_distance(m1.numpy(), m2.numpy(), s1.numpy(), s2.numpy())
    assert float(found.distance) == pytest.approx(float(want), rel=1e-9)


def test_the_gaussian_map_carries_one_cloud_onto_the_moments_of_the_other() -> None:
    x, y = draw(4, 200, 5), draw(5, 150, 5) @ draw(6, 5, 5) + 2
    moved = transport.gaussian_points(x, y)(x)
    torch.testing.assert_close(moved.mean(0), y.mean(0))
    torch.testing.assert_close(torch.cov(moved.T, correction=0), torch.cov(y.T, correction=0))


def test_commuting_gaussians_have_a_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0], dtype=D), torch.tensor([4.0, 4.0, 1.0], dtype=D)
    zero = torch.zeros(3, dtype=D)
    found = transport.gaussian(zero, a.diag(), zero, b.diag())
    assert float(found.distance) == pytest.approx(float((a.sqrt() - b.sqrt()).norm()))


def test_gaussian_gradients_match_finite_differences() -> None:
    m1, m2 = draw(0, 3).requires_grad_(), draw(1, 3)
    s1, s2 = spd(2, 3).requires_grad_(), spd(3, 3).requires_grad_()

    def distance(mean: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return transport.gaussian(mean, (left + left.T) / 2, m2, (right + right.T) / 2).distance

    assert torch.autograd.gradcheck(distance, (m1, s1, s2))


def test_a_batch_of_gaussians_is_measured_as_each_alone() -> None:
    means, covs = draw(0, 4, 3), torch.stack([spd(i, 3) for i in range(4)])
    found = transport.gaussian(means, covs, means.flip(0), covs.flip(0)).distance
    alone = transport.gaussian(means[1], covs[1], means[2], covs[2]).distance
    assert float(found[1]) == pytest.approx(float(alone))


def test_above_4096_dimensions_low_rank_clouds_are_still_exact() -> None:
    x = draw(7, 40, 5000)
    found = transport.gaussian_points(x, 2 * x)
    spread = x.var(0, correction=0).sum() + x.mean(0).square().sum()
    assert float(found.distance) == pytest.approx(float(spread.sqrt()), rel=1e-6)
    torch.testing.assert_close(found(x), 2 * x, atol=1e-6, rtol=1e-6)


def test_the_barycenter_on_the_line_is_the_mean_of_quantiles() -> None:
    x = draw(8, 30, 1)
    got = transport.barycenter_1d(torch.cat([x, x + 4], dim=1))
    torch.testing.assert_close(got, x[:, 0].sort().values + 2)


def test_the_barycenter_on_a_grid_is_neither_blurred_nor_biased() -> None:
    grid = torch.linspace(0, 1, 80, dtype=D)
    rows = [torch.exp(-((grid - m) ** 2) / (2 * s**2)) for m, s in ((0.3, 0.05), (0.7, 0.1))]
    cost = (grid[:, None] - grid) ** 2
    got = transport.barycenter_grid(torch.stack(rows), cost)
    mean = float((got * grid).sum())
    assert mean == pytest.approx(0.5, abs=2e-3)
    assert float((got * (grid - mean) ** 2).sum().sqrt()) == pytest.approx(0.075, abs=2e-3)
    same = transport.barycenter_grid(torch.stack([rows[0], rows[0]]), cost)
    torch.testing.assert_close(same, rows[0] / rows[0].sum(), atol=1e-6, rtol=0)


def test_the_gaussian_barycenter_agrees_with_pot() -> None:
    means, covs = draw(9, 3, 4), torch.stack([spd(i, 4) for i in range(3)])
    mean, cov = transport.barycenter_gaussian(means, covs)
    want = ot.gaussian.bures_wasserstein_barycenter(means.numpy(), covs.numpy(), num_iter=5000)
    torch.testing.assert_close(mean, torch.as_tensor(want[0]).reshape(-1))
    torch.testing.assert_close(cov, torch.as_tensor(want[1]), atol=1e-5, rtol=1e-4)


def test_a_barycenter_without_closed_form_is_refused() -> None:
    with pytest.raises(TransportError, match="there is no closed form for p=3"):
        transport.barycenter_1d(draw(0, 5, 2), p=3.0)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), m=st.integers(1, 30))
def test_a_tree_gives_a_plan_and_so_an_upper_bound(seed: int, n: int, m: int) -> None:
    x, y = draw(seed, n, 3), draw(seed + 1, m, 3)
    found = transport.flowtree(x, y, seed=seed)
    plan = torch.zeros(n, m, dtype=D)
    plan.index_put_((found.links.rows, found.links.columns), found.links.mass, accumulate=True)
    torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=D), atol=1e-9, rtol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((m,), 1 / m, dtype=D), atol=1e-9, rtol=0)
    exact = transport.coupling_points(x, y, p=1, eps=0).cost
    assert found.distance >= exact * (1 - 1e-9)


def test_candidates_find_the_cloud_that_is_nearest() -> None:
    clouds = [draw(i, 60, 4) + 0.4 * draw(100 + i, 4) for i in range(30)]
    hits = 0
    for i in (3, 11, 17, 25):
        query = clouds[i] + 0.05 * draw(200 + i, 60, 4)
        hits += int(transport.candidates(query, clouds, keep=3)[0][0]) == i
    assert hits == 4


def test_no_effect_stays_below_its_null_and_a_shift_rises_above() -> None:
    x, y = draw(10, 200, 8), draw(11, 200, 8)

    def distance(s: Tensor, t: Tensor) -> float:
        return transport.coupling_points(s, t, eps=0).cost ** 0.5

    nothing = transport.estimate(distance, x, y, resamples=10, splits=5)
    shifted = transport.estimate(distance, x, y + 2, resamples=10, splits=5)
    assert not nothing.visible
    assert nothing.excess < 0.1 * nothing.value
    assert shifted.visible
    assert shifted.low <= shifted.value <= shifted.high


def test_estimates_repeat_for_a_seed() -> None:
    x, y = draw(12, 40, 2), draw(13, 40, 2)
    runs = [transport.estimate(transport.sliced, x, y, resamples=5, seed=3) for _ in range(2)]
    assert runs[0] == runs[1]


def test_too_few_rows_for_a_null_are_refused() -> None:
    with pytest.raises(TransportError, match="samples of 3 and 3 rows give no null"):
        transport.estimate(transport.sliced, draw(0, 3, 2), draw(1, 3, 2))


def test_unpaired_clouds_are_refused() -> None:
    with pytest.raises(TransportError, match="are not paired"):
        paired_rows(draw(0, 3, 2), draw(1, 4, 2))


def test_order_of_the_points_changes_no_distance() -> None:
    x, y = draw(14, 40, 3), draw(15, 40, 3) + 1
    way = torch.randperm(40)
    for verb in (
        transport.sliced,
        transport.divergence,
        lambda s, t: transport.max_sliced(s, t).distance,
    ):
        assert float(verb(x[way], y)) == pytest.approx(float(verb(x, y)), rel=1e-6)


def test_covariances_that_do_not_fit_their_means_are_refused() -> None:
    with pytest.raises(TransportError, match="do not fit"):
        fitting(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(3))
