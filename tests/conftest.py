"""The same numbers every time, and shapes that are checked while testing."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

F = TypeVar("F", bound=Callable[..., object])
_tower = BeartypeConf(is_pep484_tower=True)  # an int is a float, as mypy has it


def checked(function: F) -> F:
    """Check a signature that names shapes, and leave every other one to mypy."""
    named = "jaxtyping" in repr(getattr(function, "__annotations__", {}))
    return beartype(conf=_tower)(function) if named else function


install_import_hook("torch_otprune", f"{__name__}.checked")
torch.set_num_threads(1)

settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", parent=settings.get_profile("ci"), max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the full zoo out unless `-m` asks for it."""
    if "zoo" not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason="the full zoo: ask for it by -m zoo")
        for item in items:
            if item.get_closest_marker("zoo"):
                item.add_marker(skip)
