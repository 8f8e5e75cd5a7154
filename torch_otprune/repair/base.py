"""The contract of a repair: a cut model and its dense original in, a better cut model out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torch_otprune.plan.model import Cut
from torch_otprune.policy.registry import REPAIRS, Setting
from torch_otprune.structure.graph import Graph
from torch_otprune.structure.layers import BatchNorm

__all__ = ["Note", "Patient", "Repair", "register"]

register = REPAIRS.register


@dataclass(frozen=True)
class Note:
    """What a repair did at one place.

    Args:
        kind: the repair.
        site: module path, or `model`.
        before: relative squared error against the dense model before.
        after: the same afterwards.
        accepted: whether the change was kept.
        text: why not, or what is worth knowing.
    """

    kind: str
    site: str
    before: float
    after: float
    accepted: bool
    text: str = ""


def _quiet(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Patient:
    """A cut model, its original, and the data to compare them on.

    Args:
        dense: the original; never written.
        small: the cut model, to be written through `surgery.put_` only.
        graph: the original's analysis.
        cuts: what was cut and is to be repaired.
        batches: calibration batches; may be empty for repairs that need none.
        seed: the policy's seed.
        progress: told the stage, the steps done and the steps in all.
    """

    dense: nn.Module
    small: nn.Module
    graph: Graph
    cuts: Sequence[Cut]
    batches: Sequence[Any]
    seed: int = 0
    progress: Callable[[str, int, int], None] = field(default=_quiet)

    def kept(self, path: str) -> Tensor | None:
        """List the output channels that a layer kept; None where all did."""
        for piece in (piece for cut in self.cuts for piece in cut.slices):
            if piece.path == path and piece.side in ("out", "through"):
                return torch.tensor(piece.keep)
        return None

    def norm_behind(self, path: str) -> nn.Module | None:
        """Find the batch-norm that directly follows a layer in the cut model."""
        tail = self.graph.tails.get(path)
        names = tail.modules if tail is not None else ()
        norms = [self.small.get_submodule(name) for name in names]
        return next((n for n in norms if isinstance(n, BatchNorm) and n.running_mean is not None), None)


class Repair(Setting, ABC):
    """Bring a cut model closer to its original. A subclass is one file."""

    needs_data: ClassVar[bool] = True

    @abstractmethod
    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Write the cut model.

        Args:
            patient: both models and the data.

        Returns:
            one note per place; a change that would increase the calibration error is not made
            and noted as not accepted.
        """
