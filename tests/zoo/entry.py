"""One architecture of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Entry"]


@dataclass(frozen=True)
class Entry:
    """One architecture or pattern.

    Args:
        family: `transformers`, `vision`, `pattern`, `recurrent`, `attention`, ...
        build: makes the model with random weights; deterministic under `torch.manual_seed`.
        example: makes one batch of two samples or more, as the model takes it.
        refused: what the reason must say where the answer is to refuse every group; empty where
            some group can be cut.
        needs: a package that must be installed for it.
    """

    family: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    refused: str = ""
    needs: str = ""
