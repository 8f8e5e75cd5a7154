"""A look ahead: take blocks out of a copy, mend it quickly, and see what is left of the output."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.criteria.layers.look import Look
from torch_otprune.plan import Drop
from torch_otprune.plan.replacement import Replacement
from torch_otprune.policy import Layers
from torch_otprune.repair import LeastSquares, Patient
from torch_otprune.repair.lockstep import distance
from torch_otprune.repair.reconstruct import Reconstruct
from torch_otprune.repair.replace import Fitted, left_to_repair
from torch_otprune.repair.replace.base import hand_norms_
from torch_otprune.statistics.reduce import ranks_where
from torch_otprune.structure import Graph, batch_size, map_tensors
from torch_otprune.structure.forward import outside_inference
from torch_otprune.structure.graph import Block
from torch_otprune.surgery import copied, exchange_

__all__ = ["Ahead", "ahead"]

_log = logging.getLogger(__name__)

_ROWS = 4  # per column of a layer: enough to compare blocks, a quarter of what a repair takes


@dataclass(frozen=True)
class Ahead(Look):
    """Measures what is left after the rule's repair when some blocks of a chain go.

    Every call costs a copy of the model, a quick refit on half of the probes, and two forward
    passes on the other half.

    Limits: of the rule's repairs, all that refit stand as one quick least squares; others, such as
    `norm`, are not tried. Blocks of other rules stay.

    Args:
        model: the dense model; left as it was.
        graph: its analysis.
        blocks: of the chain.
        rule: whose replacement and repair are tried.
        fit: batches for the repair.
        held: batches for the comparison.
        seed: the policy's seed.
        known: what was tried already.
    """

    model: nn.Module
    graph: Graph
    blocks: Sequence[Block]
    rule: Layers
    fit: Sequence[Any]
    held: Sequence[Any]
    seed: int
    known: dict[tuple[str, ...], float] = field(default_factory=dict)

    def __call__(self, gone: Collection[int]) -> float:
        """Try it within the chain.

        Args:
            gone: numbers of the blocks that go.

        Returns:
            squared change of the output as a share of its power, on held-out samples; NaN where
            the model does not run without them while their places are still held.
        """
        return self.among([self.blocks[number].name for number in gone])

    def among(self, gone: Collection[str]) -> float:
        """Try it with any blocks of the model.

        Args:
            gone: names of the blocks that go.

        Returns:
            the same.
        """
        key = tuple(sorted(gone))
        if key not in self.known:
            try:
                self.known[key] = self._tried(key)
            except Exception:  # noqa: BLE001  forward is the user's: it may raise anything
                _log.debug("the model cannot be tried without %s", key, exc_info=True)
                self.known[key] = nan
        return self.known[key]

    def _tried(self, gone: tuple[str, ...]) -> float:
        with outside_inference(), torch.no_grad():
            small = copied(self.model)
            drops = [self._drop(b) for b in self.graph.blocks if b.name in gone]
            exchange_(small, drops)
            mended = Patient(
                self.model,
                small,
                self.graph,
                (),
                (),
                self.fit,
                drops=drops,
                gone=drops,
                seed=self.seed,
            )
            self._mend_(mended)
            return distance(self.model, small, self.held)

    def _drop(self, block: Block) -> Drop:
        standing = self.rule.replace
        assert isinstance(standing, Replacement)
        return Drop(
            block=block.name,
            rule=0,
            criterion="",
            replace=standing.kind,
            reason="",
            error=0.0,
            swaps=standing.swaps(block),
        )

    def _mend_(self, patient: Patient) -> None:
        refits = any(isinstance(r, LeastSquares | Reconstruct) for r in self.rule.repair)
        standing = self.rule.replace
        if left_to_repair(standing, [LeastSquares()] if refits else []):
            hand_norms_(patient)
        elif isinstance(standing, Fitted):
            standing.apply_(patient)
        if refits:
            LeastSquares(rows_per_column=_ROWS, one_sided=0).apply_(patient)


def ahead(
    model: nn.Module,
    graph: Graph,
    blocks: Sequence[Block],
    rule: Layers,
    *,
    batches: Sequence[Any],
    seed: int,
) -> Ahead | None:
    """Prepare a look ahead at one chain.

    Args:
        model: the dense model.
        graph: its analysis.
        blocks: of the chain.
        rule: the rule that owns them.
        batches: all ranks' probes, the same on every rank; every other sample is held out.
        seed: the policy's seed.

    Returns:
        what can be called; None where there are too few probes to hold some out.
    """
    fit = [half for batch in batches if (half := _half(batch, 0)) is not None]
    held = [half for batch in batches if (half := _half(batch, 1)) is not None]
    if ranks_where(not fit or not held):
        return None
    return Ahead(model, graph, blocks, rule, fit, held, seed)


def _half(batch: Any, first: int) -> Any:
    """Take every other sample; None where that leaves none."""
    size = batch_size(batch)
    if size <= first:
        return None

    def take(tensor: Tensor) -> Tensor:
        return tensor[first::2] if tensor.dim() and len(tensor) == size else tensor

    return map_tensors(batch, take)
