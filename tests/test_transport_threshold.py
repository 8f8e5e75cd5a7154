"""Claims about the threshold at which logistic masks meet a budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_trial import peak
from torch_otprune.errors import TransportError
from torch_otprune.transport.threshold import _CHUNKS, BINS, PASSES, fill_, threshold

D = torch.float64


class Reads(TorchDispatchMode):
    """Counts how many entries of one tensor's storage are given to any operation."""

    def __init__(self, watched: Tensor) -> None:
        super().__init__()
        self.home, self.read = watched.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "detach" not in str(func):
            given = [a for a in args if isinstance(a, Tensor)]
            mine = [a for a in given if a.untyped_storage().data_ptr() == self.home]
            self.read += sum(a.numel() for a in mine)
        return func(*args, **(kwargs or {}))


def scores_of(kind: str, count: int, seed: int, dtype: torch.dtype = D) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g, dtype=D)
    made = {
        "normal": x,
        "two values": (x > 0).double(),
        "heavy tails": x / torch.rand(count, generator=g, dtype=D).clamp_min(1e-4) ** 2,
        "all alike": torch.zeros(count, dtype=D),
        "far from zero": x + 1e4,
    }
    return made[kind].to(dtype)


KINDS = ["normal", "two values", "heavy tails", "all alike", "far from zero"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [10.0, 0.3, 0.01])
def test_the_threshold_is_the_root_that_scipy_brackets(kind: str, eps: float) -> None:
    scores, costs = scores_of(kind, 300, 1), torch.rand(300, dtype=D) + 0.1
    budget = 0.3 * float(costs.sum())

    def spent(t: float) -> float:
        return float(np.dot(costs.numpy(), expit((scores.numpy() - t) / eps))) - budget

    low, high = float(scores.min()) - 100 * eps, float(scores.max()) + 100 * eps
    root = brentq(spent, low, high, xtol=1e-14, rtol=1e-15, maxiter=1000)
    found = threshold([scores], budget, eps=eps, costs=[costs])
    # between two values far apart any threshold will do: masks must agree, not thresholds
    masks = [expit((scores.numpy() - t) / eps) for t in (root, found.at)]
    np.testing.assert_allclose(masks[0], masks[1], atol=1e-9)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 400),
    share=st.floats(0.01, 0.99),
    log_eps=st.floats(-4, 3),
    kind=st.sampled_from(KINDS),
    costly=st.booleans(),
)
def test_any_budget_is_met_in_at_most_eight_passes(
    seed: int, count: int, share: float, log_eps: float, kind: str, costly: bool
) -> None:
    scores, eps = scores_of(kind, count, seed), 10.0**log_eps
    costs = torch.rand(count, dtype=D) + 0.1 if costly else torch.ones(count, dtype=D)
    budget = share * float(costs.sum())
    found = threshold([scores], budget, eps=eps, costs=[costs] if costly else None)
    mask = fill_(torch.empty_like(scores), scores, found.at, eps)
    assert float((mask * costs).sum()) == pytest.approx(budget, rel=1e-6)
    assert found.passes + 1 <= PASSES


@pytest.mark.parametrize(("kind", "costly"), [("normal", True), ("heavy tails", False)])
def test_ten_million_scores_are_read_at_most_eight_times_and_the_count_is_honest(
    kind: str, costly: bool
) -> None:
    count = 10**7
    scores = scores_of(kind, count, 0, torch.float32)
    costs = [torch.rand(count) + 0.1] if costly else None
    budget = 0.3 * (count if costs is None else float(costs[0].sum(dtype=D)))
    mask = torch.empty_like(scores)
    with Reads(scores) as reads:
        found = threshold([scores], budget, eps=0.05, costs=costs)
        fill_(mask, scores, found.at, 0.05)
    assert reads.read / count == found.passes + 1 <= PASSES
    paid = mask if costs is None else mask * costs[0]
    assert float(paid.sum(dtype=D)) == pytest.approx(budget, rel=1e-6)


def test_parts_with_one_cost_each_are_one_vector_with_costs() -> None:
    parts = [torch.randn(7, dtype=D), torch.randn(2, 5, dtype=D), torch.empty(0, dtype=D)]
    whole, costs = torch.cat([p.flatten() for p in parts]), torch.tensor([2.0] * 7 + [0.5] * 10)
    apart = threshold(parts, 6.0, eps=0.2, costs=[2.0, 0.5, 1.0])
    together = threshold([whole], 6.0, eps=0.2, costs=[costs.double()])
    assert apart.at == pytest.approx(together.at, rel=1e-12)


def test_masks_rise_with_their_scores() -> None:
    scores = torch.randn(1000).sort().values
    found = threshold([scores], 250.0, eps=0.01)
    mask = fill_(torch.empty_like(scores), scores, found.at, 0.01)
    assert bool((mask.diff() >= 0).all())


def test_float32_scores_meet_a_budget_that_is_softer_than_their_rounding() -> None:
    scores = torch.randn(1000) + 100  # neighbours are 8e-6 apart
    found = threshold([scores], 300.0, eps=1e-5)
    mask = fill_(torch.empty_like(scores), scores, found.at, 1e-5)
    assert float(mask.sum(dtype=D)) == pytest.approx(300, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(TransportError, match="a score is NaN or infinite"):
        threshold([torch.tensor([0.0, bad])], 1.0)


@pytest.mark.parametrize("budget", [0.0, 2.0, -1.0])
def test_a_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(TransportError, match="is not strictly between 0 and 2"):
        threshold([torch.zeros(2)], budget)


def test_no_scores_at_all_are_refused() -> None:
    with pytest.raises(TransportError, match="there is nothing to choose from"):
        threshold([torch.empty(0)], 1.0)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_softness_that_is_not_above_zero_is_refused(eps: float) -> None:
    with pytest.raises(TransportError, match="is not above 0 and finite"):
        threshold([torch.zeros(2)], 1.0, eps=eps)


@pytest.mark.parametrize("cost", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("each", [False, True])
def test_a_cost_that_is_not_above_zero_is_refused(cost: float, each: bool) -> None:
    costs = [torch.tensor([3.0, cost])] if each else [cost]
    with pytest.raises(TransportError, match="a cost is not above 0"):
        threshold([torch.zeros(2)], 1.0, costs=costs)


def test_whole_numbers_are_costs_as_well() -> None:
    x = torch.randn(9, dtype=D)
    assert threshold([x], 6.0, costs=[2]).at == threshold([x], 6.0, costs=[2.0]).at


def test_a_histogram_is_added_up_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred chunks, each with its own histogram, would be 13 MB at once."""
    monkeypatch.setitem(_CHUNKS, "cpu", 1000)
    scores = scores_of("normal", 100_000, 3, torch.float32)
    assert 0 < peak(lambda: threshold([scores], 30_000.0)) < 8 * 8 * BINS
