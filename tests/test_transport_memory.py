"""Claims about clouds whose costs do not fit: no matrix, fewer dimensions, another engine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_otprune import transport
from torch_otprune.transport import dispatch, keops, reduce
from torch_otprune.transport.geometry import BLOCK, Cloud, softmin

D = torch.float64
N = 2300
REASON = keops.unavailable_because()
no_compiler = pytest.mark.skipif(
    REASON == "no C++ compiler was found", reason="KeOps needs a C++ compiler, and none is here"
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


class Largest(TorchDispatchMode):
    """Remember the largest tensor that anything made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run the operation and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            # A view such as `expand` holds no memory of its own.
            if isinstance(part, Tensor):
                held = part.untyped_storage().nbytes() // part.element_size()
                self.entries = max(self.entries, held)
        return out

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching."""
        super().__exit__(kind, value, trace)


def largest(question: Callable[[], object]) -> int:
    with Largest() as seen:
        question()
    return seen.entries


def sources() -> Tensor:
    return draw(0, N, 3).float()


def targets() -> Tensor:
    return draw(1, N, 3).float() + 1


def asked(solver: str, d: int = 3) -> None:
    x, y = sources()[:, :d], targets()[:, :d]
    found = transport.coupling_points(x, y, eps=0.5, solver=solver, tol=9e-3)
    assert found.solver == solver
    assert found.cost > 0
    assert found.apply(y).shape == found.barycentric_map(y).shape == (N, d)
    assert found.assignment().shape == (N,)


def trained(p: float) -> None:
    x = sources().requires_grad_()
    transport.divergence(x, targets(), p=p, eps=0.5, solver="blocks").backward()
    assert x.grad is not None


QUESTIONS: dict[str, Callable[[], object]] = {
    "coupling in blocks": lambda: asked("blocks"),
    "divergence in blocks, with its gradient": lambda: trained(2.0),
    "divergence for p = 1 in blocks, with its gradient": lambda: trained(1.0),
    "line": lambda: transport.coupling_points(draw(2, 20_000, 1), draw(3, 15_000, 1)).cost,
    "sliced": lambda: transport.sliced(sources(), targets(), count=64),
    "max_sliced": lambda: transport.max_sliced(sources(), targets(), steps=3),
    "flowtree": lambda: transport.flowtree(sources(), targets()),
    "gaussian": lambda: transport.gaussian_points(sources(), targets()),
}


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_no_question_about_large_clouds_makes_a_matrix(name: str) -> None:
    assert 1.3 * BLOCK < N * N
    assert largest(QUESTIONS[name]) <= BLOCK + N


def test_a_stored_cost_is_seen_by_this_measure() -> None:
    assert largest(lambda: transport.sqdist(sources(), targets())) >= N * N


@no_compiler
def test_keops_makes_no_matrix_either() -> None:
    assert largest(lambda: asked("keops", d=1)) <= BLOCK + N


@no_compiler
def test_a_keops_reduction_agrees_with_float64() -> None:
    x, y, h = draw(4, 70, 1), draw(5, 50, 1), draw(6, 50)
    want = softmin(Cloud(x, y, 2.0), h, 0.3)
    got = keops.softmin_keops(x.float(), y.float(), h.float(), 0.3, 2.0)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no more than a thousand costs could be stored, and KeOps were best in 8 dimensions."""
    for module in (dispatch, reduce, sys.modules["torch_otprune.transport.divergence"]):
        monkeypatch.setattr(module, "STORED", 1000)
    monkeypatch.setattr(dispatch, "LOW_CPU", 8)
    yield
    keops.unavailable_because.cache_clear()


@pytest.mark.usefixtures("little_memory")
def test_without_keops_costs_that_do_not_fit_go_through_torch_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keops, "_probe", lambda: "no C++ compiler was found")
    keops.unavailable_because.cache_clear()
    x, y = draw(7, 60, 1), draw(8, 50, 1) + 1
    with caplog.at_level(logging.WARNING):
        found = [transport.coupling_points(x, y, eps=0.1) for _ in range(3)]
    assert {one.solver for one in found} == {"blocks"}
    assert caplog.text.count("KeOps is not used (no C++ compiler was found)") == 1


@no_compiler
@pytest.mark.usefixtures("little_memory")
def test_with_keops_costs_that_do_not_fit_go_through_it() -> None:
    x, y = draw(7, 60, 1).float(), draw(8, 50, 1).float() + 1
    found = transport.coupling_points(x, y, eps=0.1, tol=1e-5)
    assert found.solver == "keops"
    want = transport.coupling_points(x.double(), y.double(), eps=0.1, solver="blocks", tol=1e-9)
    torch.testing.assert_close(found.plan().double(), want.plan(), atol=1e-6, rtol=1e-2)


@pytest.mark.usefixtures("little_memory")
def test_large_clouds_are_reduced_to_64_dimensions_and_the_report_says_what_that_left_out() -> None:
    x = draw(9, 60, 80) * torch.linspace(2, 0.1, 80, dtype=D)
    y = draw(10, 50, 80) * torch.linspace(2, 0.1, 80, dtype=D) + 0.2
    spread = torch.linalg.eigvalsh(torch.cov(torch.cat([x, y]).T))
    want = float(spread[:-64].sum() / spread.sum())
    assert want > 0
    plan = transport.coupling_points(x, y, eps=0.1)
    report = transport.divergence_report(x, y)
    assert plan.geometry.like.shape == (60, 64)
    assert plan.left_out == pytest.approx(want, rel=1e-9)
    assert report.left_out == pytest.approx(want, rel=1e-9)


@pytest.mark.usefixtures("little_memory")
def test_what_has_no_more_than_64_dimensions_is_left_as_it_is() -> None:
    found = transport.coupling_points(draw(11, 60, 64), draw(12, 50, 64), eps=0.1)
    assert found.left_out == 0


def test_all_directions_change_no_distance_and_fewer_only_lower_it() -> None:
    x, y = draw(13, 40, 6), draw(14, 40, 6) + 0.5
    costs = [transport.coupling_points(x, y, dims=d, eps=0).cost for d in (2, 4, 6)]
    assert costs[0] <= costs[1] <= costs[2]
    assert costs[2] == pytest.approx(transport.coupling_points(x, y, eps=0).cost)


def test_formulas_are_cached_per_user(tmp_path: Path) -> None:
    code = (
        "import os; from torch_otprune.transport import keops; keops.import_keops(); "
        "print(os.environ['KEOPS_CACHE_FOLDER'])"
    )
    gone = {"KEOPS_CACHE_FOLDER", "XDG_CACHE_HOME"}
    environment = {k: v for k, v in os.environ.items() if k not in gone}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / ".cache" / "torch_otprune" / "keops")
    assert done.stderr == ""
