"""Claims about what a large exact coupling can be asked, and about live channel laws."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune import transport

D = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def masses(seed: int, n: int, empty: int) -> Tensor:
    w = torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.01
    w[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:empty]] = 0
    return w / w.sum()


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 25),
    m=st.integers(2, 25),
    empty=st.integers(0, 1),
    ties=st.booleans(),
    p=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
)
def test_prices_of_a_sorted_coupling_prove_it_optimal(
    seed: int, n: int, m: int, empty: int, ties: bool, p: float
) -> None:
    x, y = draw(seed, n, 1), draw(seed + 1, m, 1)
    if ties:
        x, y = x.round(), y.round()
    found = transport.coupling_points(x, y, masses(seed, n, empty), masses(seed + 1, m, empty), p=p)
    assert found.solver == "line"
    f, g = found.potentials
    assert float((transport.ground_cost(x, y, p=p) - f[:, None] - g).min()) > -1e-10
    paid = float((found.a * f).sum() + (found.b * g).sum())
    assert paid == pytest.approx(found.cost, rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 20), m=st.integers(1, 20))
def test_the_target_that_receives_most_is_that_of_the_plan(seed: int, n: int, m: int) -> None:
    for d in (1, 2):
        x, y, a, b = draw(seed, n, d), draw(seed + 1, m, d), masses(2, n, 0), masses(3, m, 0)
        found = transport.coupling_points(x, y, a, b, eps=0)
        assert torch.equal(found.assignment(), found.plan().argmax(1))


def test_a_source_without_mass_has_a_defined_target() -> None:
    a = torch.tensor([0.5, 0.0, 0.5])
    found = transport.coupling_points(torch.rand(3, 1), torch.rand(4, 1), a)
    assert torch.equal(found.assignment(), found.plan().argmax(1))


def test_a_line_of_many_points_is_priced_and_assigned_without_a_matrix() -> None:
    x, y = draw(0, 100_000, 1), draw(1, 70_000, 1)
    start = time.process_time()
    found = transport.coupling_points(x, y)
    f, g = found.potentials
    target = found.assignment()
    assert time.process_time() - start < 2
    paid = float(f.mean() + g.mean())
    assert paid == pytest.approx(found.cost, rel=1e-8)
    # Rank by rank: the target of the k-th source is the one at the same share of the mass.
    rank = torch.empty(70_000, dtype=torch.long)
    rank[y[:, 0].argsort()] = torch.arange(70_000)
    at = rank[target[x[:, 0].argsort()]]
    assert float((at / 70_000 - torch.arange(100_000) / 100_000).abs().max()) < 1e-4


def near() -> Tensor:
    x = draw(2, 400, 12)
    return torch.cat([x, x + 1e-4 * draw(3, 400, 12)], dim=1)


@pytest.mark.parametrize("stacked", [False, True])
def test_live_channels_that_nearly_coincide_keep_their_digits(stacked: bool) -> None:
    x = near()
    want = transport.pairwise_1d(x)
    live = x.float().requires_grad_()
    got = transport.pairwise_1d(live[None])[0] if stacked else transport.pairwise_1d(live)
    assert float(got.detach().diagonal().abs().max()) == 0
    assert float((got - want).detach().abs().max()) < 2e-7


def test_the_gradient_of_channel_laws_matches_finite_differences() -> None:
    x = draw(4, 20, 5).requires_grad_()
    for p in (1.0, 2.0, 3.0):
        assert torch.autograd.gradcheck(lambda s, p=p: transport.pairwise_1d(s, p=p).triu(1), x)


def test_the_gradient_of_close_channels_in_float32_is_that_in_float64() -> None:
    slopes = []
    for x in (near().requires_grad_(), near().float().requires_grad_()):
        laws = transport.pairwise_1d(x)
        (slope,) = torch.autograd.grad(laws[:12, 12:].diagonal().sum(), x)
        slopes.append(slope.double())
    assert float((slopes[1] - slopes[0]).norm() / slopes[0].norm()) < 0.01
