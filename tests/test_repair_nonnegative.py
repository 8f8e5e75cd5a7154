"""Least squares with entries that must not be negative, and the refit of layers in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.nn import ICRNN
from torch_otprune.repair.nonnegative import nonnegative
from torch_otprune.repair.solve import Normal, solve


def problem(seed: int, columns: int, out: int, rows: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, out, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), columns=st.integers(1, 20), out=st.integers(1, 6))
def test_it_agrees_with_scipy(seed: int, columns: int, out: int) -> None:
    x, y = problem(seed, columns, out)
    found = nonnegative(x.T @ x, x.T @ y, torch.ones(columns, out, dtype=torch.bool))
    for j in range(out):
        exact, _ = nnls(x.numpy(), y[:, j].numpy())
        np.testing.assert_allclose(found[:, j].numpy(), exact, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), columns=st.integers(1, 20), share=st.floats(0, 1))
def test_the_conditions_of_optimality_hold_with_some_entries_free(
    seed: int, columns: int, share: float
) -> None:
    x, y = problem(seed, columns, 4)
    floor = torch.rand(columns, 4, generator=torch.Generator().manual_seed(seed)) < share
    found = nonnegative(x.T @ x, x.T @ y, floor)
    slope = x.T @ (x @ found - y)
    assert bool((found[floor] >= 0).all())
    assert bool((slope[~floor].abs() < 1e-8).all())
    assert bool((slope[floor] > -1e-8).all())
    assert float((slope * found)[floor].abs().sum()) < 1e-7


def test_nothing_bound_is_plain_least_squares() -> None:
    x, y = problem(0, 7, 3)
    found = nonnegative(x.T @ x, x.T @ y, torch.zeros(7, 3, dtype=torch.bool))
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution)


def test_a_nearly_singular_problem_ends() -> None:
    x, y = problem(3, 12, 5)
    x = torch.cat([x, x + 1e-7 * problem(4, 12, 5)[0]], 1)
    gram = x.T @ x + 1e-9 * torch.eye(24, dtype=torch.float64)
    found = nonnegative(gram, x.T @ y, torch.ones(24, 5, dtype=torch.bool))
    assert bool((found >= 0).all()) and bool(found.isfinite().all())


def test_a_bound_fit_is_never_worse_than_the_old_weights() -> None:
    x, y = problem(1, 9, 4)
    fit, held = (Normal.empty(9, 4, torch.device("cpu")) for _ in range(2))
    fit.update(x[:50], y[:50])
    held.update(x[50:], y[50:])
    old = torch.rand(9, 4, dtype=torch.float64)
    found = solve(fit, held, old, floor=torch.ones(9, 4, dtype=torch.bool))
    assert bool((found.weight >= 0).all()) and found.after <= found.before


def test_a_layer_in_a_loop_is_refitted_to_what_the_dense_net_writes() -> None:
    """Units that are copies: what is left can say all, and the refit finds that."""
    torch.manual_seed(0)
    net = ICRNN(2, 4, 1, layers=1).double()
    cell = net.cells[0]
    wide = ICRNN(2, 8, 1, layers=1).double()
    big = wide.cells[0]
    with torch.no_grad():
        for name in ("u", "d2", "d3", "w", "d1", "v"):
            small = getattr(cell, name).weight
            if name in ("w", "d1", "v"):
                small = torch.cat([small, small], 1) / 2
            getattr(big, name).weight.copy_(torch.cat([small, small]))
        wide.out.weight.copy_(torch.cat([net.out.weight] * 2, 1) / 2)
        wide.out.bias.copy_(net.out.bias)
    data = [torch.randn(64, 5, 2, dtype=torch.float64) for _ in range(4)]
    repairs = [{"kind": kind, "ridge": 1e-9} for kind in ("recurrent", "least_squares")]
    policy = otp.Policy(
        rules=otp.Channels(keep="50%", criterion="transport", repair=repairs), preserve="convex"
    )
    report = otp.prune_(wide, policy, data, timing=0)
    assert report.output_error.before_repair > 1e-3
    assert report.output_error.after_repair < 1e-6
    torch.testing.assert_close(wide(data[0]), net(data[0]), rtol=1e-5, atol=1e-6)


def test_a_net_without_loops_is_left_alone_and_the_report_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    policy = otp.Policy(rules=otp.Channels(keep="50%", criterion="magnitude", repair="recurrent"))
    report = otp.prune_(net, policy, [torch.randn(32, 4, dtype=torch.float64)], timing=0)
    (note,) = report.repairs
    assert note.note == "no dense layer that lost inputs runs more than once per forward pass"
    assert (note.site, note.accepted) == ("model", False)


@pytest.mark.parametrize("sweeps", [1, 3])
def test_more_sweeps_do_no_harm(sweeps: int) -> None:
    torch.manual_seed(0)
    net = ICRNN(3, 12, 2).double()
    data = [torch.randn(64, 5, 3, dtype=torch.float64) for _ in range(4)]
    repair = {"kind": "recurrent", "sweeps": sweeps}
    policy = otp.Policy(rules=otp.Channels(keep="50%", criterion="transport", repair=repair))
    report = otp.prune_(net, policy, data, timing=0)
    sites = [note.site for note in report.repairs]
    assert len(sites) == len(set(sites)) > 0
    assert report.output_error.after_repair <= report.output_error.before_repair
