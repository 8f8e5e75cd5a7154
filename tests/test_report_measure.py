"""Sizes, MACs and times: exact where they can be, honest where they cannot."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_otprune.report import count_macs, count_params, interval, latency
from torch_otprune.structure.trace import trace


class Sleeper(nn.Module):
    """A model that takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        self.calls += 1
        return x * self.weight


class Everything(nn.Module):
    """One of every layer that is counted, one shared, one free of charge."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.norm, self.drop = nn.BatchNorm2d(12), nn.Dropout()
        self.line = nn.Conv1d(12, 6, 2)
        self.shared = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(self.grouped(self.plain(x))))
        x = self.line(self.drop(x).flatten(2)).transpose(1, 2)
        out: Tensor = self.shared(self.shared(x))
        return out


IMAGES = torch.ones(2, 3, 8, 8)
MACS = (
    64 * 8 * 3 * 9  # plain: positions x out x in/groups x taps
    + 16 * 12 * 2 * 9  # grouped, stride 2
    + 16 * 12 * 1 * 25  # depthwise
    + 15 * 6 * 12 * 2  # line, no padding
    + 2 * 15 * 6 * 6  # shared: rows x in x out, twice
)


def test_macs_are_those_counted_by_hand() -> None:
    assert count_macs(Everything(), IMAGES) == MACS


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_macs_are_per_sample(samples: int) -> None:
    assert count_macs(Everything(), torch.ones(samples, 3, 8, 8)) == MACS


def test_macs_and_params_are_those_of_the_cost_model() -> None:
    model = Everything()
    graph = trace(model, IMAGES)
    assert count_macs(model, IMAGES) == graph.costs["macs"].at(graph.full())
    assert count_params(model) == graph.costs["params"].at(graph.full())


def test_embeddings_cost_no_macs() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    assert count_macs(model, torch.zeros(2, 7, dtype=torch.int64)) == 7 * 4 * 3


@pytest.mark.parametrize("batch", [(IMAGES, torch.zeros(2)), [IMAGES], {"x": IMAGES}])
def test_macs_are_counted_on_batches_of_every_form(batch: Any) -> None:
    assert count_macs(Everything(), batch) == MACS


def test_tied_parameters_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_params(model) == 16 + 4


def test_counting_leaves_no_trace() -> None:
    model = Everything().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    count_macs(model, IMAGES)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_go_even_if_the_model_fails() -> None:
    model = Everything()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.ones(2, 4, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_sleeps_half_as_long_is_twice_as_fast() -> None:
    found = latency(Sleeper(0.02), Sleeper(0.01), torch.ones(4, 1), seconds=0.6)
    assert found.speedup.median == pytest.approx(2.0, rel=0.3)
    assert 20 <= found.before.median < 30  # milliseconds
    assert found.samples == 4


def test_intervals_hold_their_medians() -> None:
    found = latency(Sleeper(0.002), Sleeper(0.001), torch.ones(1), seconds=0.2)
    for measured in (found.before, found.after, found.speedup):
        assert measured.low <= measured.median <= measured.high


def test_timing_keeps_to_its_time() -> None:
    start = time.perf_counter()
    latency(Sleeper(0.01), Sleeper(0.01), torch.ones(1), seconds=0.3)
    assert time.perf_counter() - start < 1.0


def test_slow_models_are_timed_three_times_each() -> None:
    slow = Sleeper(0.05)
    found = latency(slow, Sleeper(0.05), torch.ones(1), seconds=0.01)
    assert found.pairs == 3
    assert slow.calls == 4  # one to warm up


def test_timing_leaves_training_flags() -> None:
    dense, pruned = Sleeper(0).train(), Sleeper(0).eval()
    latency(dense, pruned, torch.ones(1), seconds=0.01)
    assert (dense.training, pruned.training) == (True, False)


def test_the_interval_of_a_constant_is_that_constant() -> None:
    found = interval(torch.full((9,), 3.5, dtype=torch.float64))
    assert (found.low, found.median, found.high) == (3.5, 3.5, 3.5)


def test_intervals_scale_with_their_values() -> None:
    values = torch.rand(50, dtype=torch.float64)
    one, ten = interval(values), interval(10 * values)
    assert (ten.low, ten.high) == pytest.approx((10 * one.low, 10 * one.high))


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    found = [interval(torch.randn(40, dtype=torch.float64)) for _ in range(200)]
    covered = sum(i.low <= 0 <= i.high for i in found) / len(found)
    assert 0.9 <= covered <= 0.99
