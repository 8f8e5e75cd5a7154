"""The W_1 critic: never above the exact distance, near it where it can be, honest beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune.errors import TransportError
from torch_otprune.transport import critic, estimate, max_sliced, wasserstein, wasserstein_1d


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "shift": lambda: (draw(60, 3), draw(60, 3, seed=1) + 1),
    "spread": lambda: (draw(60, 2), 3 * draw(60, 2, seed=1)),
    "line": lambda: (draw(50, 1), draw(50, 1, seed=1).square()),
    "unequal sizes": lambda: (draw(30, 3), draw(60, 3, seed=1) - 2),
    "same law": lambda: (draw(60, 8), draw(60, 8, seed=1)),
    "far from the origin": lambda: (draw(60, 3) + 1e4, draw(60, 3, seed=1) + 1e4),
    "tiny": lambda: (1e-6 * draw(60, 3), 2e-6 * draw(60, 3, seed=1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [1, 40])
def test_a_critic_is_never_above_the_exact_distance(case: str, steps: int) -> None:
    x, y = CASES[case]()
    found = critic(x, y, steps=steps, width=16)
    exact = float(wasserstein(x, y, p=1, solver="exact"))
    assert 0 <= float(found.distance) <= exact * (1 + 1e-9)
    assert found.max_sliced <= exact * (1 + 1e-6)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.floats(0.1, 5), st.integers(0, 99))
def test_no_cloud_gets_it_above_the_exact_distance(d: int, scale: float, seed: int) -> None:
    x, y = draw(24, d, seed=seed), scale * draw(24, d, seed=seed + 1)
    exact = float(wasserstein(x, y, p=1, solver="exact"))
    assert float(critic(x, y, steps=5, width=8).distance) <= exact * (1 + 1e-9)


def test_on_the_line_it_comes_near_the_exact_distance() -> None:
    x, y = draw(200, 1), 3 * draw(200, 1, seed=1) + 1
    found, exact = critic(x, y, steps=150, width=32), float(wasserstein_1d(x, y, p=1))
    assert 0.93 * exact <= float(found.distance) <= exact * (1 + 1e-9)


def test_it_sees_what_no_direction_shows() -> None:
    """A ball against a larger one: the best potential is the length, which no slice is."""
    x, y = draw(300, 4), 3 * draw(300, 4, seed=1)
    found = critic(x, y, steps=150, width=32)
    assert float(found.distance) > 1.2 * found.max_sliced
    assert not found.underfit
    assert found.bound == float(found.distance)


def test_no_two_points_differ_by_more_than_their_distance() -> None:
    x, y = draw(100, 3), 2 * draw(100, 3, seed=1)
    potential = critic(x, y, steps=30, width=16).potential
    a, b = 5 * draw(500, 3, seed=2), 5 * draw(500, 3, seed=3)
    assert potential.lipschitz <= 1 + 1e-12
    assert bool(((potential(a) - potential(b)).abs() <= (a - b).norm(dim=1) * (1 + 1e-9)).all())


def test_it_stands_beside_max_sliced_and_a_subsample() -> None:
    x, y = draw(90, 3), draw(80, 3, seed=1) + 1
    found = critic(x, y, steps=5, sample=40)
    assert found.max_sliced == pytest.approx(float(max_sliced(x, y, p=1).distance))
    assert found.sample == 40
    assert found.sinkhorn > found.null > 0
    said = str(found)
    assert all(word in said for word in ("W1 critic", "max-sliced", "Sinkhorn", "on 40 rows"))


def test_a_critic_that_learnt_too_little_says_so() -> None:
    x, y = draw(100, 8), draw(100, 8, seed=1)
    y[:, 0] *= 9
    found = critic(x, y, steps=1, width=2, depth=1)
    assert found.underfit
    assert found.bound == found.max_sliced
    assert "take more steps" in str(found)


def test_fresh_rows_see_through_what_is_only_noise() -> None:
    x, y = draw(60, 16), draw(60, 16, seed=1)
    found = critic(x, y, steps=80)
    assert found.fresh < float(found.distance)


def test_one_unit_of_length_is_as_good_as_another() -> None:
    x, y = draw(60, 3), draw(60, 3, seed=1) + 1
    one, two = (critic(c * x, c * y, steps=10) for c in (1.0, 1024.0))
    assert float(two.distance) == pytest.approx(1024 * float(one.distance), rel=1e-4)


def test_the_same_seed_gives_the_same_critic() -> None:
    x, y = draw(60, 3), draw(60, 3, seed=1)
    one, two = (critic(x, y, steps=10, seed=3) for _ in range(2))
    assert float(one.distance) == float(two.distance)


def test_dead_clouds_are_no_distance_apart() -> None:
    dead = torch.zeros(20, 3)
    assert float(critic(dead, dead, steps=2).distance) == 0
    assert float(critic(dead, dead + 2, steps=2).distance) <= 12**0.5 * (1 + 1e-9)


def test_an_estimate_takes_it_with_its_null() -> None:
    x, y = draw(60, 2), draw(60, 2, seed=1) + 4
    found = estimate(lambda a, b: critic(a, b, steps=40, width=8), x, y, splits=2, resamples=2)
    assert found.visible


@pytest.mark.parametrize(
    ("settings", "problem", "fix"),
    [
        ({"width": 3}, "3 units cannot be sorted in pairs", "even number"),
        ({"steps": 0}, "steps", "1"),
        ({"rate": 0.0}, "rate is 0.0", "positive finite rate"),
        ({"sample": 2}, "sample is 2", "at least 4 rows"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, Any], problem: str, fix: str
) -> None:
    with pytest.raises(TransportError) as caught:
        critic(draw(20, 2), draw(20, 2), **settings)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_too_few_points_are_sent_to_the_exact_solver() -> None:
    with pytest.raises(TransportError, match="5 and 20 points train no critic") as caught:
        critic(draw(5, 2), draw(20, 2))
    assert "`wasserstein`, which is exact" in caught.value.fix
