"""Claims about what cannot be answered: every such question is refused, in three lines."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torch_otprune import transport
from torch_otprune.errors import TransportError
from torch_otprune.transport import ask as asking
from torch_otprune.transport.barycenter import _supported
from torch_otprune.transport.checks import masses, wide
from torch_otprune.transport.facility import _sizes
from torch_otprune.transport.gaussian import fitting, matrix_root

NAN, INF = math.nan, math.inf
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 10, generator=G), torch.randn(12, 10, generator=G) + 0.5
COST, COSTS = transport.sqdist(X, Y), torch.rand(2, 3, 4, generator=G)
ROWS, LINE = torch.rand(2, 5, generator=G), transport.sqdist(torch.arange(5.0)[:, None])
EYE, KEEP, ZERO = torch.eye(4), torch.tensor([0, 1]), torch.zeros(4)
FOUND = transport.facility_location(COST, sizes=3)
HOLE = X.clone()
HOLE[2, 3] = NAN

# What is asked, and how the answer starts.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a temperature that is no number": (lambda: transport.coupling(COST, eps=NAN), "eps is nan"),
    "an infinite temperature": (lambda: transport.coupling(COST, eps=INF), "eps is inf"),
    "a price that is no number": (
        lambda: transport.coupling(COST, relax=(1.0, NAN)),
        r"relax is \(1.0, nan\)",
    ),
    "a tolerance below zero": (
        lambda: transport.coupling(COST, eps=0.1, tol=-1.0),
        "tol is -1.0 and limit is 5000",
    ),
    "no iterations": (lambda: transport.coupling(COST, eps=0.1, limit=0), "limit is 0"),
    "costs below the smallest number": (
        lambda: transport.coupling(COST * 1e-40, eps=0.1),
        "a temperature of .* is no number of torch.float32",
    ),
    "a batch at a negative temperature": (
        lambda: transport.couplings(COSTS, eps=-1.0),
        "eps is -1.0",
    ),
    "a batch at a temperature that is no number": (
        lambda: transport.couplings(COSTS, eps=NAN),
        "eps is nan",
    ),
    "a batch of nothing": (
        lambda: transport.couplings(torch.zeros(0, 3, 4), eps=0.1),
        r"costs of shape \(0, 3, 4\) are no batch of problems",
    ),
    "keops for a matrix of costs": (
        lambda: transport.coupling(COST, eps=0.1, solver="keops"),
        "recomputes costs from points, and here is a matrix",
    ),
    "no dimensions": (lambda: transport.coupling_points(X, Y, dims=0), "dims is 0"),
    "less than no dimensions": (lambda: transport.principal(X, Y, -1), "dims is -1"),
    "directions of a hole": (lambda: transport.principal(HOLE, Y, 2), "1 of 120 entries of x"),
    "a divergence at infinite temperature": (
        lambda: transport.divergence(X, Y, eps=INF),
        "eps is inf",
    ),
    "no slices": (lambda: transport.sliced(X, Y, count=0), "count is 0"),
    "features in no direction": (lambda: transport.sliced_features(X, count=0), "count is 0"),
    "features without levels": (lambda: transport.sliced_features(X, levels=0), "levels is 0"),
    "a kernel that grows": (lambda: transport.sliced_kernel(X, gamma=-1.0), "gamma is -1.0"),
    "quantiles without levels": (lambda: transport.quantiles(X, 0), "levels is 0"),
    "quantiles of a hole": (lambda: transport.quantiles(HOLE, 4), "1 of 120 entries of x"),
    "a soft choice without an end": (lambda: transport.soft_topk(X, 3, eps=INF), "eps is inf"),
    "a barycenter at no temperature": (
        lambda: transport.barycenter_grid(ROWS, LINE, eps=0.0),
        "eps is 0.0",
    ),
    "a barycenter at a temperature that is no number": (
        lambda: transport.barycenter_grid(ROWS, LINE, eps=NAN),
        "eps is nan",
    ),
    "a barycenter in no iterations": (
        lambda: transport.barycenter_grid(ROWS, LINE, limit=0),
        "limit is 0",
    ),
    "a barycenter that still moves": (
        lambda: transport.barycenter_grid(ROWS, LINE, limit=1),
        "of the mass still moves after 1 iterations",
    ),
    "histograms on another support": (
        lambda: _supported(ROWS, LINE[:4, :4], 0.1, 9),
        r"histograms of shape \(2, 5\) do not fit a cost of \(4, 4\)",
    ),
    "a mean of no Gaussians": (
        lambda: transport.barycenter_gaussian(X[:0, :4], EYE.expand(0, 4, 4)),
        "do not fit covariances",
    ),
    "a covariance below zero": (
        lambda: transport.gaussian(ZERO, EYE, ZERO, -EYE),
        "a covariance has an eigenvalue of -1 times its largest",
    ),
    "a covariance that is not symmetric": (
        lambda: fitting(ZERO, EYE, ZERO, torch.ones(4, 4).triu()),
        "a covariance is not symmetric",
    ),
    "means of two sizes": (lambda: fitting(ZERO, EYE, X[0], EYE), "do not fit"),
    "a set that was not looked for": (lambda: FOUND.keep(9), "a set of 9 was not looked for"),
    "a set of a negative size": (lambda: FOUND.keep(-1), "a set of -1 was not looked for"),
    "the gap of an unknown set": (lambda: FOUND.gap(9), "a set of 9 was not looked for"),
    "a set of half a unit": (
        lambda: _sizes([2.5], 12),  # type: ignore[list-item]
        "a set of 2.5 is asked of 12",
    ),
    "swaps of a unit that is not there": (
        lambda: transport.improve(COST, None, torch.tensor([0, 99]), rounds=1),
        r"\[0, 99\] is no set of candidates",
    ),
    "swaps of a unit that is there twice": (
        lambda: transport.improve(COST, None, torch.tensor([1, 1]), rounds=1),
        r"\[1, 1\] is no set of candidates",
    ),
    "swaps under costs that are no numbers": (
        lambda: transport.improve(COST * NAN, None, KEEP, rounds=2),
        "a cost is not a number",
    ),
    "the nearest of no clouds": (
        lambda: transport.candidates(X, [], keep=1),
        "there are no clouds to look among",
    ),
    "none of some clouds": (lambda: transport.candidates(X, [Y], keep=0), "keep is 0"),
    "a solver for no points": (lambda: transport.explain(0), "between 0 and 0 points"),
    "a solver for a dream": (
        lambda: transport.explain(9, purpose="dream"),  # type: ignore[arg-type]
        "there is no dream between 9 and 9 points",
    ),
    "complex numbers": (
        lambda: wide(torch.zeros(2, dtype=torch.complex64), "x"),
        "x is no tensor of real numbers, but torch.complex64",
    ),
    "weights of another batch": (
        lambda: masses(torch.ones(5, 3), COSTS, 3, "a"),
        r"a of shape \(5, 3\) weighs no measure of 3 points",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_question_without_an_answer_is_refused(name: str) -> None:
    question, answer = REFUSED[name]
    # Shapes are checked while testing, so that some of these are refused before they are read.
    with pytest.raises(TransportError, match=answer) as caught:
        question()
    assert re.fullmatch(r"\S.*\.\n  where: \S.*\n  fix:   \S.*\.", str(caught.value))


def test_a_list_is_no_tensor_and_the_error_says_what_to_do() -> None:
    code = "from torch_otprune import transport; transport.pairwise_1d([[1.0], [2.0]])"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert "TransportError: x is no tensor of real numbers, but list." in done.stderr
    assert "torch.as_tensor" in done.stderr


def test_keops_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "unavailable_because", lambda: "the test says so")
    with pytest.raises(TransportError, match="KeOps does not run here: the test says so") as caught:
        transport.coupling_points(X, Y, eps=0.1, solver="keops")
    assert "use solver='blocks'" in caught.value.fix


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    code = """
import torch
from torch_otprune import transport
print(transport.explain(100_000, d=2, device="cuda").splitlines()[0])
x = torch.randn(9, 2)
transport.divergence(x, x + 1, solver="geomloss")
"""
    root = Path(__file__).parent.parent
    environment = {"PYTHONPATH": str(root), "KEOPS_CACHE_FOLDER": str(taken / "below")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("blocks")
    assert done.stderr.count("KeOps is not used") == 1
    assert "TransportError: there is no folder for compiled formulas" in done.stderr


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "verb",
    [
        lambda x, y: transport.sqdist(x, y),
        lambda x, y: transport.sqdist(x),
        lambda x, y: transport.ground_cost(x, y, p=1.0),
        lambda x, y: transport.quantiles(x, 5),
        lambda x, y: transport.principal(x, y, 3)[0],
    ],
)
def test_small_tools_compute_half_precision_in_single(
    verb: Callable[[Tensor, Tensor], Tensor], kind: torch.dtype
) -> None:
    x, y = X.to(kind), Y.to(kind)
    got = verb(x, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), verb(x.double(), y.double()), atol=1e-4, rtol=1e-4)


def test_a_bound_without_a_null_forbids_it() -> None:
    want = transport.lower_bound(COST, COST.amax(1), KEEP, rounds=5)
    assert transport.lower_bound(COST, None, KEEP, rounds=5) == want


def test_directions_of_dead_channels_leave_gradients_finite() -> None:
    x = X.clone()
    x[:, 5:] = 0
    x.requires_grad_()
    transport.divergence_report(x, Y * (torch.arange(10) < 5), dims=3).distance.backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_the_root_of_a_covariance_without_variance_is_zero() -> None:
    assert float(matrix_root(torch.zeros(3, 3)).abs().max()) == 0
