"""Claims about the soft choice of the k largest."""

from __future__ import annotations

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_otprune.errors import TransportError
from torch_otprune.transport import soft_topk

D = torch.float64


@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), eps=st.floats(0.01, 10.0))
def test_the_budget_is_met_to_rounding(seed: int, n: int, eps: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores, costs = torch.randn(n, generator=g, dtype=D), torch.rand(n, generator=g, dtype=D) + 0.1
    k = 0.37 * float(costs.sum())
    mask = soft_topk(scores, k, eps=eps, costs=costs)
    assert float((mask * costs).sum()) == pytest.approx(k, rel=1e-9)
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1


def test_the_mask_is_the_converged_sinkhorn_plan() -> None:
    scores, k, eps = torch.randn(20, dtype=D), 7.0, 0.3
    cost = torch.stack([scores, torch.zeros(20, dtype=D)], dim=1)
    plan = ot.sinkhorn(
        [1 / 20] * 20, [1 - k / 20, k / 20], cost.numpy(), eps,
        method="sinkhorn_log", numItermax=100_000, stopThr=1e-14,
    )  # fmt: skip
    want = torch.from_numpy(plan[:, 1] * 20)
    torch.testing.assert_close(soft_topk(scores, k, eps=eps), want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("with_costs", [False, True])
def test_the_gradient_is_exact_and_keeps_the_budget(with_costs: bool) -> None:
    scores = torch.randn(15, dtype=D, requires_grad=True)
    costs = torch.rand(15, dtype=D) + 0.5 if with_costs else None

    def mask(s: torch.Tensor) -> torch.Tensor:
        return soft_topk(s, 5.5, eps=0.4, costs=costs)

    assert torch.autograd.gradcheck(mask, scores)
    paid = mask(scores) if costs is None else mask(scores) * costs
    (slope,) = torch.autograd.grad(paid.sum(), scores)
    assert float(slope.abs().max()) < 1e-10


def test_a_small_temperature_gives_the_hard_choice() -> None:
    scores = torch.randperm(50).double()
    hard = torch.zeros(50, dtype=D)
    hard[scores.topk(12).indices] = 1
    torch.testing.assert_close(soft_topk(scores, 12, eps=1e-2), hard, atol=1e-9, rtol=0)


def test_shifting_all_scores_changes_nothing() -> None:
    scores = torch.randn(30, dtype=D)
    torch.testing.assert_close(soft_topk(scores + 100, 9), soft_topk(scores, 9), atol=1e-9, rtol=0)


def test_many_entries_meet_their_budget_in_float32() -> None:
    mask = soft_topk(torch.randn(3_000_000), 1e6, eps=0.05)
    assert float(mask.sum(dtype=D)) == pytest.approx(1e6, rel=1e-5)


@pytest.mark.parametrize("k", [0.0, 5.0, 7.0, -1.0])
def test_a_budget_out_of_range_is_refused(k: float) -> None:
    with pytest.raises(TransportError, match="is not strictly between 0 and 5"):
        soft_topk(torch.zeros(5), k)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(TransportError, match=r"eps is 0\.0"):
        soft_topk(torch.zeros(5), 2, eps=0.0)


def test_a_cost_of_zero_is_refused() -> None:
    with pytest.raises(TransportError, match="a cost is missing, zero or negative"):
        soft_topk(torch.zeros(2), 0.5, costs=torch.tensor([1.0, 0.0]))
