"""Claims about the default device: it is the caller's, and the room never asks it for anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor

from torch_otprune import transport
from torch_otprune.transport import keops
from torch_otprune.transport.gaussian import _main_directions

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 10, generator=G), torch.randn(12, 10, generator=G) + 0.5
FEW, MANY = Y[:7], torch.randn(300, 3, generator=G)
A = torch.rand(12, generator=G) + 0.1
B = torch.rand(12, generator=G) + 0.1
A, B = A / A.sum(), B / B.sum()
WIDE = torch.randn(260, 515, generator=G)
COST, KEEP = transport.sqdist(X, Y), torch.tensor([0, 3])
NULL, COV = COST.amax(1), torch.eye(10).expand(2, 10, 10)
LINE = transport.sqdist(torch.arange(10.0)[:, None])
LINKS = torch.tensor([[(i + 1) % len(X)] for i in range(len(X))])
PRICES, NOTHING = torch.rand(len(X), 1, generator=G), X.square().sum(1)
estimate = transport.estimate

CASES: dict[str, Callable[[], object]] = {
    "assignment": lambda: transport.assignment(COST),
    "barycenter_1d": lambda: transport.barycenter_1d(X, A[:10]),
    "barycenter_gaussian": lambda: transport.barycenter_gaussian(X[:2], COV),
    "barycenter_grid": lambda: transport.barycenter_grid(X.abs(), LINE, eps=0.1),
    "candidates": lambda: transport.candidates(X, [Y, X], keep=1),
    "coupling entropic": lambda: transport.coupling(COST, eps=0.1).plan(),
    "coupling exact": lambda: transport.coupling(COST).plan(),
    "coupling nearest": lambda: transport.coupling(COST, relax=(torch.inf, 0.0)).plan(),
    "coupling weighted": lambda: transport.coupling(COST, A, B, eps=0.0).plan(),
    "coupling_points blocks": lambda: _plan(X, Y, eps=0.1, solver="blocks"),
    "coupling_points few": lambda: _plan(X, Y),
    "coupling_points line": lambda: _plan(X[:, :1], FEW[:, :1]),
    "coupling_points many": lambda: _plan(MANY, MANY.flip(0) + 1),
    "coupling_points paired": lambda: _plan(X, X + 0.001),
    "coupling_points unequal": lambda: _plan(X, FEW),
    "couplings": lambda: [found.plan() for found in transport.couplings(COST[None], eps=0.1)],
    "critic": lambda: transport.critic(X, Y, steps=3).distance,
    "divergence": lambda: transport.divergence(X, Y),
    "divergence geomloss": lambda: transport.divergence(X, Y, solver="geomloss"),
    "divergence of layers": lambda: transport.divergence(X[None], Y[None]),
    "estimate": lambda: estimate(transport.sliced, X, Y, splits=2, resamples=2),
    "facility_location": lambda: transport.facility_location(COST, sizes=[2], swaps=2, duals=3),
    "facility_location_sparse": lambda: transport.facility_location_sparse(LINKS, PRICES, NOTHING),
    "flowtree": lambda: transport.flowtree(X, Y, A, B),
    "gaussian_points": lambda: transport.gaussian_points(X, Y)(X),
    "gaussian_points wide": lambda: _main_directions(WIDE, 2 * WIDE),
    "improve": lambda: transport.improve(COST, NULL, KEEP, rounds=2),
    "lower_bound": lambda: transport.lower_bound(COST, NULL, KEEP, rounds=5),
    "max_sliced": lambda: transport.max_sliced(X, Y),
    "nearest": lambda: transport.nearest(X, 3),
    "nearest trees": lambda: transport.nearest(MANY, 3, method="trees"),
    "pairwise_1d": lambda: transport.pairwise_1d(X),
    "pivoted_cholesky": lambda: transport.pivoted_cholesky(lambda i: X @ X[i], X.square().sum(1)),
    "potentials": lambda: transport.coupling(COST).potentials,
    "principal": lambda: transport.principal(X, Y, 3),
    "quantiles": lambda: transport.quantiles(X, 5),
    "sliced": lambda: transport.sliced(X, Y),
    "sliced_features": lambda: transport.sliced_features(X),
    "sliced_kernel": lambda: transport.sliced_kernel(X),
    "soft_topk": lambda: transport.soft_topk(X, 3.0),
    "wasserstein": lambda: transport.wasserstein(X, Y),
    "wasserstein many": lambda: transport.wasserstein(MANY, MANY[:200] + 1),
    "wasserstein_1d": lambda: transport.wasserstein_1d(X, FEW, A),
}  # fmt: skip


def _plan(x: Tensor, y: Tensor, **asked: object) -> Tensor:
    return transport.coupling_points(x, y, **asked).plan()  # type: ignore[arg-type]


def parts(found: object) -> list[object]:
    """Take an answer apart into tensors and plain values."""
    if is_dataclass(found):
        return [p for field in fields(found) for p in parts(getattr(found, field.name))]
    if isinstance(found, dict):
        return [p for value in found.values() for p in parts(value)]
    if isinstance(found, list | tuple):
        return [p for value in found for p in parts(value)]
    return [found]


def test_every_verb_that_computes_is_asked() -> None:
    asked = {name.split()[0] for name in CASES}
    words = {name for name in transport.__all__ if name[0].islower()}
    simple = {"sqdist", "ground_cost", "explain", "divergence_report", "gaussian"}
    assert words - asked - simple == {"paired_distance"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_another_default_device_changes_no_answer(name: str) -> None:
    want = parts(CASES[name]())
    # What were made on this device would hold no data at all.
    with torch.device("meta"):
        got = parts(CASES[name]())
    for one, two in zip(got, want, strict=True):
        if isinstance(two, Tensor):
            assert isinstance(one, Tensor)
            assert one.device == two.device
            torch.testing.assert_close(one, two, equal_nan=True)
        else:
            assert one == two


def test_keops_is_probed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def reduce(x: Tensor, y: Tensor, h: Tensor, eps: float, p: float) -> Tensor:
        asked.extend(part.device.type for part in (x, y, h))
        return -(1 + (h - 1).exp()).log()

    monkeypatch.setattr(keops, "softmin_keops", reduce)
    monkeypatch.setattr(keops.shutil, "which", lambda name: name)
    with torch.device("meta"):
        assert keops._probe() is None
    assert set(asked) == {"cpu"}
