"""The one door to pykeops: lazy, quiet, locked, and not needed."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.errors import TransportError
from torch_otprune.transport.checks import refuse

__all__ = ["available", "import_keops", "softmin_keops", "unavailable_because"]

logger = logging.getLogger(__name__)
# Concurrent reductions gave silently wrong sums in pykeops 2.3, so there is one at a time.
LOCK = threading.RLock()


def available() -> bool:
    """Say whether a KeOps reduction runs here; the first call compiles one."""
    return unavailable_because() is None


@cache
def unavailable_because() -> str | None:
    """Give the reason why KeOps does not run here, or None; said once in the log."""
    reason = _probe()
    if reason is not None:
        logger.warning("KeOps is not used (%s); large clouds go through torch in blocks.", reason)
    return reason


def softmin_keops(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], h: Float[Tensor, " m"], eps: float, p: float
) -> Float[Tensor, " n"]:
    """Compute -eps log sum_j exp(h_j - |x_i - y_j|^p / eps) in memory O(n + m).

    Args:
        x: sources, float32 or float64.
        y: targets.
        h: log weights plus scaled potentials.
        eps: temperature, in the unit of the cost.
        p: 1 or 2.

    Returns:
        one soft minimum per source, in the unit of the cost.
    """
    refuse(
        p not in {1, 2},
        f"the KeOps solver knows p=1 and p=2, not {p:g}.",
        where="argument solver",
        fix="use solver='blocks'.",
    )
    formula = "SqDist(X,Y)" if p == 2 else "Norm2(X-Y)"
    return -eps * _logsumexp(formula, x, y, h, eps)


def _logsumexp(formula: str, x: Tensor, y: Tensor, h: Tensor, eps: float) -> Tensor:
    keops = import_keops()
    d = x.shape[1]
    names = [f"X=Vi({d})", f"Y=Vj({d})", "H=Vj(1)", "E=Pm(1)"]
    key = (formula, d, x.dtype, x.device.type, sys.version_info[:2])
    with LOCK, _compiling(key), contextlib.redirect_stdout(io.StringIO()):
        sums = keops.generic_logsumexp(f"H-E*{formula}", "A=Vi(1)", *names)
        args = (x.contiguous(), y.contiguous(), h[:, None].contiguous(), x.new_tensor([1 / eps]))
        with torch.no_grad():
            out: Tensor = sums(*args)
    return out[:, 0]


@contextlib.contextmanager
def _compiling(key: tuple[object, ...]) -> Iterator[None]:
    """Say on stderr, once per formula and dimension on this machine, why a call is slow."""
    name = "-".join(re.sub(r"\W+", "", str(part)) for part in key)
    done = Path(os.environ["KEOPS_CACHE_FOLDER"]) / f"compiled-{name}"
    if not done.exists():
        logger.warning("KeOps compiles %s for the first time here; this takes 6 to 60 s.", name)
    yield
    with contextlib.suppress(OSError):
        done.touch()


@cache
def import_keops() -> Any:
    """Import pykeops without its printing, with a per-user cache."""
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    os.environ.setdefault("KEOPS_VERBOSE", "0")
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = os.environ.setdefault("KEOPS_CACHE_FOLDER", f"{home}/torch_otprune/keops")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TransportError(
            f"there is no folder for compiled formulas at {folder}: {error.strerror}.",
            where="the environment variable KEOPS_CACHE_FOLDER",
            fix="set it to a folder that you may write.",
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):
        import pykeops.torch
    return pykeops.torch


def _probe() -> str | None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", os.environ.get("CXX", ""))):
        return "no C++ compiler was found"
    try:
        x = torch.tensor([[0.0], [1.0]], device="cpu")
        got = softmin_keops(x, x, x.new_zeros(2), 1.0, 2.0)
    except Exception as error:  # noqa: BLE001 -- pykeops raises many kinds with one meaning
        return f"its first reduction failed: {type(error).__name__}: {error}"
    want = -x.new_full((2,), 1 + math.exp(-1)).log()
    return None if torch.allclose(got, want, atol=1e-5) else "its first reduction was wrong"
