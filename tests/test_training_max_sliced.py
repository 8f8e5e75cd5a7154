"""LaCoOT's distance, and the traps its published form falls into."""

from __future__ import annotations

import math

import ot
import pytest
import torch
from torch import Tensor

from torch_otprune.errors import PolicyError
from torch_otprune.policy.registry import PENALTIES
from torch_otprune.training import MaxSliced, Memory

PUBLISHED = MaxSliced(directions="random", projections=50, relative=False, weight=5.0)
PLAIN = MaxSliced(relative=False)


def cloud(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype)


def value(penalty: MaxSliced, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    return penalty.value(x, y, Memory(seed))


def brute(x: Tensor, y: Tensor, angles: int = 20_000) -> float:
    """Try every direction of the plane."""
    angle = torch.linspace(0, math.pi, angles, dtype=x.dtype)
    theta = torch.stack([angle.cos(), angle.sin()])
    moved = (x @ theta).sort(0).values - (y @ theta).sort(0).values
    return float(moved.square().mean(0).sqrt().max())


@pytest.mark.parametrize("penalty", [PLAIN, MaxSliced(), MaxSliced(paired=1.0), PUBLISHED])
def test_a_cloud_is_at_distance_zero_of_itself_with_zero_gradient(penalty: MaxSliced) -> None:
    x = cloud(20, 6).requires_grad_()
    distance = value(penalty, x, x.clone())
    distance.backward()
    assert distance == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("size", [2, 72, 128])
def test_a_translation_costs_its_length(size: int) -> None:
    x, shift = cloud(size, 50), cloud(1, 50, seed=1)
    distance = value(PLAIN, x, x + shift)
    torch.testing.assert_close(distance, shift.norm())


@pytest.mark.parametrize("seed", range(6))
def test_it_equals_the_best_of_all_directions_in_the_plane(seed: int) -> None:
    x, y = cloud(40, 2, seed), cloud(40, 2, seed + 100) @ cloud(2, 2, seed + 200)
    found = float(value(MaxSliced(relative=False, ascent=30, projections=32), x, y))
    assert found == pytest.approx(brute(x, y), rel=1e-4)


@pytest.mark.parametrize("rows", [7, 72])
def test_the_published_form_is_the_best_of_fifty_directions(rows: int) -> None:
    x, y = cloud(rows, 30), cloud(rows, 30, seed=1) + 0.5
    theta = Memory(seed=3).draw(x, 50)
    theta = theta / theta.norm(dim=0)
    want = ot.max_sliced_wasserstein_distance(x, y, projections=theta, p=2)
    torch.testing.assert_close(value(PUBLISHED, x, y, seed=3), want)


def test_random_directions_are_blind_where_informed_ones_see() -> None:
    x = cloud(128, 4096)
    y = x.clone()
    y[:, 7] += 5.0
    assert value(PLAIN, x, y) == pytest.approx(5.0, rel=1e-6)
    assert value(PUBLISHED, x, y) < 0.5


def test_a_change_of_spread_is_seen_where_the_means_agree() -> None:
    x = cloud(500, 300)
    x = x - x.mean(0)
    y = x.clone()
    y[:, 11] *= 3
    along = x[:, 11].sort().values
    want = (2 * along).square().mean().sqrt()
    assert float(value(PLAIN, x, y)) >= 0.99 * float(want)


@pytest.mark.parametrize("penalty", [PLAIN, MaxSliced(), PUBLISHED])
def test_the_order_of_the_samples_does_not_matter(penalty: MaxSliced) -> None:
    x, y = cloud(33, 8), cloud(33, 8, seed=1)
    mixed = value(penalty, x[torch.randperm(33)], y[torch.randperm(33)])
    torch.testing.assert_close(mixed, value(penalty, x, y))


def test_a_block_that_permutes_samples_costs_only_the_paired_term() -> None:
    x = cloud(16, 5)
    y = x.flip(0)
    assert value(MaxSliced(), x, y) < 1e-12
    want = 0.5 * (x - y).square().mean() / x.square().mean()
    torch.testing.assert_close(value(MaxSliced(paired=0.5), x, y), want)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_relative_distance_does_not_vanish_when_features_shrink(factor: float) -> None:
    x, y = cloud(64, 20), cloud(64, 20, seed=1) * 2 + 1
    dense = float(value(MaxSliced(), x, y))
    assert float(value(MaxSliced(), factor * x, factor * y)) == pytest.approx(dense, rel=1e-6)
    absolute = float(value(PLAIN, factor * x, factor * y))
    assert absolute == pytest.approx(factor * float(value(PLAIN, x, y)), rel=1e-6)


def test_the_relative_distance_counts_standard_deviations_of_the_input() -> None:
    x = cloud(400, 1) * 3
    want = 1.5 / x.std(correction=0)
    torch.testing.assert_close(value(MaxSliced(), x, x + 1.5), want)


def test_a_constant_input_gives_a_finite_relative_distance() -> None:
    x = torch.zeros(9, 4, requires_grad=True)
    y = cloud(9, 4, dtype=torch.float32).requires_grad_()
    distance = value(MaxSliced(paired=1.0), x, y)
    distance.backward()
    assert torch.isfinite(distance) and distance > 0
    assert torch.isfinite(x.grad).all() and torch.isfinite(y.grad).all()


@pytest.mark.parametrize("paired", [0.0, 0.7])
def test_a_single_sample_has_a_distance(paired: float) -> None:
    x = cloud(1, 6)
    assert torch.isfinite(value(MaxSliced(paired=paired), x, x + 1))


def test_the_short_last_batch_is_compared_sample_by_sample() -> None:
    # Reshaping 72 maps to the configured 128 rows would mix samples without an error.
    maps = cloud(72, 64 * 16).view(72, 64, 4, 4)
    moved = maps.clone()
    moved[:, 3, 1, 2] += 2.0
    memory = Memory(seed=0)
    PLAIN.value(
        cloud(128, 64 * 16).view(128, 64, 4, 4), cloud(128, 1024).view(128, 64, 4, 4), memory
    )
    memory.commit()
    torch.testing.assert_close(
        PLAIN.value(maps, moved, memory), torch.tensor(2.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("paired", [0.0, 0.5])
def test_the_gradient_agrees_with_finite_differences(paired: float) -> None:
    x, y = cloud(9, 6).requires_grad_(), (cloud(9, 6, seed=1) * 2).requires_grad_()
    frozen = PUBLISHED.model_copy(update={"paired": paired})
    if paired:  # its scale is taken as a constant
        x.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda a, b: value(frozen, a, b), (x, y))


def test_the_gradient_flows_through_the_sort_and_not_through_the_direction() -> None:
    x, y, memory = cloud(9, 6), (cloud(9, 6, seed=1) * 2).requires_grad_(), Memory(seed=0)
    (found,) = torch.autograd.grad(PLAIN.value(x, y, memory), y)
    memory.commit()
    theta = memory.recall("direction", x, 1)
    moved = (x @ theta).sort(0).values - (y @ theta).sort(0).values
    torch.testing.assert_close(found, torch.autograd.grad(moved.square().mean().sqrt(), y)[0])


def test_the_scale_of_the_relative_distance_takes_no_gradient() -> None:
    x, y = cloud(30, 4), (cloud(30, 4, seed=1) + 1).requires_grad_()
    (relative,) = torch.autograd.grad(value(MaxSliced(), x, y), y)
    (absolute,) = torch.autograd.grad(value(PLAIN, x, y), y)
    ratio = relative.norm() / absolute.norm()
    torch.testing.assert_close(relative, absolute * ratio)


def test_the_penalty_of_a_step_is_the_same_however_often_it_is_computed() -> None:
    x, y, memory = cloud(16, 40), cloud(16, 40, seed=1), Memory(seed=0)
    first = [MaxSliced().value(x, y, memory) for _ in range(3)]
    assert first[0] == first[1] == first[2]


def test_a_warm_start_remembers_the_direction_that_a_step_found() -> None:
    cold = MaxSliced(relative=False, ascent=0, pca=0, projections=1, decay=0.0)
    x = cloud(200, 64)
    x = x - x.mean(0)
    y = x.clone()
    y[:, 5] *= 4
    y[:, 6] += 0.1  # else rounding alone tells where the means differ
    memory = Memory(seed=0)
    found = [float(cold.value(x, y, memory))]
    MaxSliced(relative=False, decay=0.0).value(x, y, memory)
    memory.commit()
    found.append(float(cold.value(x, y, memory)))
    assert found[1] > 2 * found[0]


def test_random_directions_differ_between_steps_and_agree_between_runs() -> None:
    x, y = cloud(16, 40), cloud(16, 40, seed=1)
    runs = []
    for _ in range(2):
        memory, run = Memory(seed=4), []
        for _ in range(3):
            run.append(float(PUBLISHED.value(x, y, memory)))
            memory.commit()
        runs.append(run)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3


def test_a_new_feature_shape_starts_afresh() -> None:
    memory = Memory(seed=0)
    for columns in (10, 12):
        x = cloud(8, columns)
        distance = PLAIN.value(x, x + 1, memory)
        memory.commit()
        torch.testing.assert_close(distance, torch.tensor(columns**0.5, dtype=torch.float64))


def test_half_precision_is_measured_in_single() -> None:
    x = cloud(64, 10, dtype=torch.float32).bfloat16()
    assert value(PLAIN, x, x + 1).dtype == torch.float32


def test_the_table_of_penalties_reads_names_and_tables() -> None:
    assert set(PENALTIES) >= {"linearity", "max_sliced"}
    written = {"kind": "max_sliced", "directions": "random", "projections": 50, "relative": False}
    assert PENALTIES.resolve(written | {"weight": 5.0}) == PUBLISHED
    assert PENALTIES.resolve(PUBLISHED.model_dump()) == PUBLISHED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": "random", "ascent": 9}, "ascent belongs to informed directions"),
        ({"weight": 2.0, "fraction": 0.3}, "fraction only counts with weight 'auto'"),
        ({"weight": -1.0}, "weight is -1.0."),
        ({"weight": math.inf}, "weight is inf."),
        ({"ascend": 3}, "'ascend' is no key of MaxSliced."),
    ],
)
def test_a_contradiction_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        MaxSliced(**settings)  # type: ignore[arg-type]
    assert message in caught.value.problem
