"""Claims about large clouds: KeOps for real, the way without a compiler, and memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from torch_otprune import transport
from torch_otprune.errors import TransportError
from torch_otprune.transport import keops
from torch_otprune.transport.geometry import Cloud, softmin

REASON = keops.unavailable_because()
# A compiler whose first reduction fails is no reason to skip: that is what these tests are for.
no_compiler = pytest.mark.skipif(
    REASON == "no C++ compiler was found", reason="KeOps needs a C++ compiler, and none is here"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    everything = os.environ | {"PYTHONPATH": str(root)} | environment
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env=everything, check=False, timeout=280,
    )  # fmt: skip


@no_compiler
def test_keops_runs_wherever_there_is_a_compiler() -> None:
    assert REASON is None


@no_compiler
def test_keops_and_torch_find_the_same_soft_minimum() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 1, generator=g), torch.randn(200, 1, generator=g)
    h = torch.randn(200, generator=g)
    got = keops.softmin_keops(x, y, h, 0.5, 2.0)
    torch.testing.assert_close(got, softmin(Cloud(x, y, 2.0), h, 0.5), atol=1e-5, rtol=1e-5)


@no_compiler
def test_a_plan_through_keops_is_the_plan_through_torch() -> None:
    x, y = torch.randn(80, 1), torch.randn(60, 1) + 1
    one = transport.coupling_points(x, y, eps=0.05, solver="keops", tol=1e-4)
    two = transport.coupling_points(x, y, eps=0.05, solver="blocks", tol=1e-4)
    assert one.solver == "keops"
    torch.testing.assert_close(one.plan(), two.plan(), atol=1e-5, rtol=1e-2)


@no_compiler
def test_the_first_compilation_speaks_on_stderr_only_and_the_second_not_at_all(
    tmp_path: Path,
) -> None:
    code = """
        import torch
        from torch_otprune.transport import keops
        assert keops.available()
    """
    first = run(code, XDG_CACHE_HOME=str(tmp_path), KEOPS_CACHE_FOLDER=str(tmp_path / "k"))
    second = run(code, XDG_CACHE_HOME=str(tmp_path), KEOPS_CACHE_FOLDER=str(tmp_path / "k"))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout == ""
    assert first.stderr.count("for the first time here") == 1
    assert "for the first time here" not in second.stderr


def test_without_a_compiler_torch_takes_over_and_says_so_once() -> None:
    code = """
        import torch
        from torch_otprune import transport
        from torch_otprune.transport import dispatch, keops
        words = [transport.explain(100_000, d=2, device="cuda") for _ in range(3)]
        assert all(line.startswith("blocks") for line in words), words
    """
    done = run(code, PATH="/nonexistent", CXX="")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no C++ compiler was found") == 1


def test_importing_the_room_imports_neither_keops_nor_geomloss_nor_scipy() -> None:
    code = """
        import sys
        import torch_otprune.transport
        loud = {"pykeops", "geomloss", "scipy", "matplotlib"} & set(sys.modules)
        assert not loud, loud
    """
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_cloud_never_holds_its_cost_matrix() -> None:
    code = """
        import resource, torch
        from torch_otprune import transport
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def solve(n):
            x = torch.randn(n, 8)
            found = transport.coupling_points(x, x + 1, eps=0.5, solver="blocks", tol=9e-3)
            found.barycentric_map(x)
            return peak()
        small = solve(2_000)
        print(solve(9_000) - small)
    """
    done = run(code)
    assert done.returncode == 0, done.stderr
    # A stored matrix of 9 000 x 9 000 would be 309 MiB.
    assert float(done.stdout) < 100


def test_a_reason_is_logged_as_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keops, "_probe", lambda: "the test says so")
    keops.unavailable_because.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not keops.available()
        assert not keops.available()
    keops.unavailable_because.cache_clear()
    assert caplog.text.count("the test says so") == 1


def test_keops_is_refused_for_other_orders() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(TransportError, match="knows p=1 and p=2, not 3"):
        transport.coupling_points(x, x + 1, p=3.0, eps=0.1, solver="keops")
