"""Claims about what a distance between samples means: its null, its interval, its pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_otprune import transport
from torch_otprune.errors import TransportError

D = torch.float64
FAST = {"splits": 4, "resamples": 6}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


# Every verb that compares two clouds, and how its number is read off.
VERBS: dict[str, tuple[Callable[[Tensor, Tensor], object], Callable[[Tensor, Tensor], float]]] = {
    "coupling_points": (
        transport.coupling_points,
        lambda x, y: transport.coupling_points(x, y).cost ** 0.5,
    ),
    "divergence": (transport.divergence, lambda x, y: float(transport.divergence(x, y))),
    "divergence_report": (
        transport.divergence_report,
        lambda x, y: float(transport.divergence(x, y)),
    ),
    "flowtree": (transport.flowtree, lambda x, y: transport.flowtree(x, y).distance),
    "gaussian_points": (
        transport.gaussian_points,
        lambda x, y: float(transport.gaussian_points(x, y).distance),
    ),
    "max_sliced": (
        transport.max_sliced,
        lambda x, y: float(transport.max_sliced(x, y).distance),
    ),
    "sliced": (transport.sliced, lambda x, y: float(transport.sliced(x, y))),
    "wasserstein": (transport.wasserstein, lambda x, y: float(transport.wasserstein(x, y))),
}


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_distance_between_clouds_carries_its_null_and_an_interval(name: str) -> None:
    verb, number = VERBS[name]
    x, y = draw(0, 40, 3), draw(1, 30, 3) + 4
    found = transport.estimate(verb, x, y, **FAST)  # type: ignore[arg-type]
    assert found.value == pytest.approx(number(x, y), rel=1e-9)
    assert 0 < found.null <= found.null_high < found.value
    assert found.low <= found.value <= found.high
    assert found.visible
    assert found.excess == pytest.approx(found.value - found.null)


def test_laws_of_single_channels_carry_them_too() -> None:
    x, y = draw(2, 60, 1), draw(3, 50, 1) + 3
    found = transport.estimate(transport.wasserstein_1d, x, y, **FAST)  # type: ignore[arg-type]
    assert found.value == pytest.approx(float(transport.wasserstein_1d(x, y)))
    assert found.visible


def test_the_null_is_what_two_halves_of_one_law_read() -> None:
    halves = [float(transport.sliced(draw(i, 50, 4), draw(50 + i, 50, 4))) for i in range(40)]
    found = transport.estimate(transport.sliced, draw(7, 100, 4), draw(8, 100, 4), splits=40)
    assert found.null == pytest.approx(sum(halves) / 40, rel=0.2)


def test_the_interval_is_as_wide_as_the_spread_over_fresh_samples() -> None:
    def once(seed: int) -> tuple[Tensor, Tensor]:
        return draw(seed, 60, 2), draw(1000 + seed, 60, 2) + 2

    values = torch.tensor([float(transport.sliced(*once(i))) for i in range(60)])
    found = [transport.estimate(transport.sliced, *once(i), resamples=40) for i in range(8)]
    width = sum(one.high - one.low for one in found) / 8
    # Between the 5th and the 95th percentile a normal law is 3.29 standard deviations wide.
    assert width == pytest.approx(3.29 * float(values.std()), rel=0.35)


def test_pairs_that_stay_together_are_measured_with_less_spread() -> None:
    x = draw(9, 80, 3)
    y = x + 0.5 + 0.05 * draw(10, 80, 3)
    loose, tied = (
        transport.estimate(transport.sliced, x, y, paired=paired) for paired in (False, True)
    )
    assert tied.high - tied.low < 0.5 * (loose.high - loose.low)


@pytest.mark.parametrize("paired", [False, True])
def test_without_an_effect_matching_rows_read_exactly_zero(paired: bool) -> None:
    x = draw(11, 50, 4)
    y = x + 0.01 * draw(12, 50, 4)
    found = transport.estimate(transport.paired_distance, x, y, paired=paired)
    assert (found.null, found.null_high) == (0.0, 0.0)
    assert found.visible
    # A bootstrap that broke the pairs would read distances of about 2.8.
    assert found.high < 2 * found.value


@pytest.mark.parametrize("n", [50, 250])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_pairs_are_recognised_where_and_only_where_no_other_matching_is_shorter(
    n: int, p: float
) -> None:
    x = draw(13, n, 32)
    near, far = x + 0.1 * draw(14, n, 32), draw(15, n, 32)
    found, other = (transport.coupling_points(x, y, p=p) for y in (near, far))
    rows = torch.linalg.vector_norm(x - near, dim=1)
    assert found.solver == "paired"
    assert found.cost == pytest.approx(float(rows.pow(p).mean()), rel=1e-10)
    assert other.solver == "exact"
    forced = transport.coupling_points(x, near, p=p, solver="exact")
    assert found.cost == pytest.approx(forced.cost, rel=1e-10)


def test_mean_squared_error_of_pairs_is_the_squared_distance() -> None:
    x = draw(16, 250, 48).float()
    y = x + 0.2 * draw(17, 250, 48).float()
    mean = float((x - y).square().sum(1).mean())
    assert transport.coupling_points(x, y).cost == pytest.approx(mean, rel=1e-6)
    assert float(transport.wasserstein(x, y)) == pytest.approx(math.sqrt(mean), rel=1e-6)


@pytest.mark.parametrize(
    "asked", [{"splits": 0}, {"resamples": 0}, {"level": 0.0}, {"level": 1.0}, {"level": math.nan}]
)
def test_an_estimate_of_nothing_is_refused(asked: dict[str, float]) -> None:
    with pytest.raises(TransportError, match=r"splits is .*, resamples is .* and level is"):
        transport.estimate(transport.sliced, draw(0, 9, 2), draw(1, 9, 2), **asked)  # type: ignore[arg-type]


def test_many_distances_at_once_are_no_estimate() -> None:
    with pytest.raises(TransportError, match="the distance has 2 entries, not one"):
        transport.estimate(transport.wasserstein_1d, draw(0, 9, 2), draw(1, 9, 2))
