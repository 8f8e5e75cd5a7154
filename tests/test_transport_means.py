"""Claims about barycenters, atoms and candidate search."""

from __future__ import annotations

import itertools

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune import transport

D = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def spd(seed: int, d: int) -> Tensor:
    root = draw(seed, d, d)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=D)


def test_weights_move_the_barycenter_on_the_line_along_its_geodesic() -> None:
    x = torch.cat([draw(0, 40, 1), 3 * draw(1, 40, 1) + 5], dim=1)
    ends = x.sort(dim=0).values
    for share in (0.0, 0.25, 1.0):
        got = transport.barycenter_1d(x, torch.tensor([1 - share, share]))
        torch.testing.assert_close(got, (1 - share) * ends[:, 0] + share * ends[:, 1])


def test_the_barycenter_of_order_one_is_no_further_from_all_than_any_of_them() -> None:
    x = draw(2, 30, 5) * torch.tensor([1.0, 2, 0.5, 1, 3], dtype=D) + draw(3, 5)
    middle = transport.barycenter_1d(x, p=1.0)[:, None]

    def far(law: Tensor) -> float:
        return float(transport.wasserstein_1d(x, law.expand(-1, 5), p=1.0).sum())

    least = far(middle)
    others = [x[:, [i]] for i in range(5)] + [transport.barycenter_1d(x)[:, None]]
    assert least <= min(far(law) for law in others) + 1e-12
    moved = middle + 0.01 * draw(4, 30, 1)
    assert least <= far(moved) + 1e-12


def test_the_barycenter_on_the_line_minimises_the_sum_of_squared_distances() -> None:
    x, w = draw(5, 30, 4) + draw(6, 4), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=D)
    middle = transport.barycenter_1d(x, w)[:, None]

    def far(law: Tensor) -> float:
        return float(w @ transport.wasserstein_1d(x, law.expand(-1, 4)).square())

    for seed in range(5):
        assert far(middle) < far(middle + 0.05 * draw(seed, 30, 1))


def test_the_debiased_barycenter_agrees_with_pot() -> None:
    grid = torch.linspace(0, 1, 40, dtype=D)
    rows = torch.stack([torch.exp(-((grid - m) ** 2) / 0.01) for m in (0.25, 0.6, 0.7)])
    rows, share = rows / rows.sum(1, keepdim=True), torch.tensor([0.5, 0.2, 0.3], dtype=D)
    cost = (grid[:, None] - grid).square()
    got = transport.barycenter_grid(rows, cost, share, eps=0.1, tol=1e-8, limit=3000)
    want = ot.bregman.barycenter_debiased(
        rows.T.contiguous().numpy(), cost.numpy(), 0.1 * float(cost.mean()),
        weights=share.numpy(), numItermax=3000, stopThr=1e-8, warn=False,
    )  # fmt: skip
    torch.testing.assert_close(got, torch.from_numpy(want), atol=1e-7, rtol=0)


def test_bins_that_are_empty_in_every_histogram_stay_nearly_empty() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]], dtype=D)
    place = torch.arange(5, dtype=D)
    got = transport.barycenter_grid(rows, (place[:, None] - place).square())
    torch.testing.assert_close(got, torch.eye(5, dtype=D)[2], atol=1e-6, rtol=0)


def test_the_barycenter_of_two_gaussians_is_on_the_geodesic_between_them() -> None:
    means, covs = draw(7, 2, 4), torch.stack([spd(8, 4), spd(9, 4)])
    there = transport.gaussian(means[0], covs[0], means[1], covs[1]).matrix
    for share in (0.3, 0.8):
        way = torch.tensor([1 - share, share], dtype=D)
        mean, cov = transport.barycenter_gaussian(means, covs, way)
        step = (1 - share) * torch.eye(4, dtype=D) + share * there
        torch.testing.assert_close(mean, way @ means)
        torch.testing.assert_close(cov, step @ covs[0] @ step, atol=1e-9, rtol=1e-9)


def test_above_4096_dimensions_a_full_rank_cloud_is_split_and_the_split_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    module = sys.modules["torch_otprune.transport.gaussian"]
    monkeypatch.setattr(module, "FULL", 30)
    monkeypatch.setattr(module, "RANK", 20)
    x = draw(10, 200, 40) * torch.linspace(3, 0.1, 40, dtype=D) + 1
    found = transport.gaussian_points(x, 2 * x)
    spread = x.var(0, correction=0).sum() + x.mean(0).square().sum()
    # Twice a cloud is as far away as the cloud is wide, however it is split.
    assert float(found.distance) == pytest.approx(float(spread.sqrt()), rel=1e-9)
    torch.testing.assert_close(found(x), 2 * x)
    least = torch.linalg.eigvalsh(torch.cov(torch.cat([x, 2 * x]).T))
    assert 0 < found.left_out < 0.5
    assert found.left_out == pytest.approx(float(least[:20].sum() / least.sum()), rel=0.3)


def test_features_of_any_sample_sizes_never_exceed_the_sliced_distance() -> None:
    x, y = draw(11, 50, 3), draw(12, 37, 3) + 0.5
    want = float(transport.sliced(x, y, count=16))
    gaps = []
    for levels in (4, 16, 64):
        one, two = (transport.sliced_features(c, count=16, levels=levels) for c in (x, y))
        gaps.append(want - float((one - two).norm()))
    assert all(gap > -1e-12 for gap in gaps)
    assert gaps[2] < 0.02 * want


@pytest.mark.parametrize("d", [1, 2, 5])
def test_directions_come_in_unit_length_and_evenly_spread(d: int) -> None:
    from torch_otprune.transport.sliced import directions

    theta = directions(d, 40 * d)
    torch.testing.assert_close(theta.norm(dim=0), torch.ones(40 * d, dtype=D))
    torch.testing.assert_close(theta @ theta.T / 40, torch.eye(d, dtype=D))


@given(seed=st.integers(0, 500))
def test_the_gap_of_facility_location_is_never_smaller_than_the_true_one(seed: int) -> None:
    x = draw(seed, 9, 2)
    cost, null = transport.sqdist(x), x.square().sum(1)
    found = transport.facility_location(cost, null, sizes=[2, 4], swaps=1, duals=40)
    for k in (2, 4):
        sets = [torch.tensor(s) for s in itertools.combinations(range(9), k)]
        best = min(float(torch.minimum(cost[:, s].amin(1), null).sum()) for s in sets)
        true = (float(found.curve[k]) - best) / float(found.curve[k])
        assert true - 1e-9 <= found.gap(k) <= 1


def test_dual_steps_only_tighten_the_bounds_and_prove_most_sets_optimal() -> None:
    gaps = []
    for seed in range(8):
        x = draw(seed, 40, 3)
        cost, null = transport.sqdist(x), x.square().sum(1)
        loose, tight = (
            transport.facility_location(cost, null, sizes=10, swaps=30, duals=n) for n in (0, 200)
        )
        assert bool((tight.bound >= loose.bound - 1e-12).all())
        assert float(tight.curve[10]) == pytest.approx(float(loose.curve[10]))
        gaps.append(tight.gap(10))
    assert sum(gaps) / 8 < 0.03


def recalled(seed: int, keep: int) -> bool:
    """Say whether the nearest of 30 clouds of one mean is among the candidates."""
    x = [draw(100 * seed + i, 30, 4) @ draw(999 + 100 * seed + i, 4, 4) for i in range(31)]
    query, *clouds = [c - c.mean(0) for c in x]
    exact = [transport.coupling_points(query, c, p=1.0, eps=0).cost for c in clouds]
    nearest = min(range(30), key=exact.__getitem__)
    # All means agree, so that the comparison of means says nothing: the trees alone decide.
    found, bound = transport.candidates(query, clouds, keep=keep, first=30)
    assert all(bound[i] >= exact[int(j)] * (1 - 1e-9) for i, j in enumerate(found))
    return nearest in found.tolist()


def test_the_nearest_of_30_clouds_is_among_four_candidates_four_times_in_five() -> None:
    assert sum(recalled(seed, 4) for seed in range(10)) >= 8


def test_clouds_far_away_on_average_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["torch_otprune.transport.flowtree"]
    seen: list[float] = []
    real = module.flowtree

    def counted(x: Tensor, y: Tensor, *, seed: int) -> object:
        seen.append(float(y.mean()))
        return real(x, y, seed=seed)

    monkeypatch.setattr(module, "flowtree", counted)
    clouds = [draw(i, 20, 2) + i for i in range(30)]
    found, _ = transport.candidates(clouds[4], clouds, keep=2, first=6)
    assert int(found[0]) == 4
    assert len(seen) == 6
    assert max(seen) < 10
