"""Replacements that have to be fitted to data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from torch_otprune.plan.model import Drop
from torch_otprune.plan.replacement import Replacement
from torch_otprune.repair.base import Note, Patient
from torch_otprune.statistics.patches import pick
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.statistics.sites import real
from torch_otprune.statistics.stream import runs
from torch_otprune.statistics.taps import Taps, flat
from torch_otprune.structure.forward import batch_size, evaluating, run
from torch_otprune.surgery.cut import put_

__all__ = ["Fitted", "Paired", "hand_norms_", "paired", "unmet"]

_ROWS = 16384  # rows per block, over all samples


class Fitted(Replacement, ABC):
    """A replacement that is fitted once the block is out, before any repair."""

    @abstractmethod
    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Write what stands in for the removed blocks.

        Args:
            patient: both models and the data; `drops` are this replacement's.

        Returns:
            one note per block.
        """


@dataclass
class Paired:
    """Sums over paired rows of a stream in front of a block, x, and behind it, y.

    Args:
        channels: of the stream.
    """

    channels: int
    count: Tensor = field(init=False)
    first: Tensor = field(init=False)
    product: Tensor = field(init=False)

    def __post_init__(self) -> None:
        both = 2 * self.channels
        zeros = torch.zeros(both + 1, both + 1, dtype=torch.float64, device="cpu")
        self.count, self.first, self.product = zeros[0, :1], zeros[0, 1:], zeros[1:, 1:]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x channels of both."""
        rows = torch.cat([x, y], dim=1)
        self.count += len(rows)
        self.first += rows.sum(0)
        self.product += rows.T @ rows

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Sum up.

        Returns:
            means of x and of y, covariance of x, of y, and of x with y (x first).
        """
        mean = self.first / self.count.clamp_min(1)
        cov = self.product / self.count.clamp_min(1) - mean[:, None] * mean
        c = self.channels
        return mean[:c], mean[c:], cov[:c, :c], cov[c:, c:], cov[:c, c:]


def paired(patient: Patient, drop: Drop) -> Paired:
    """Observe the dense network around a removed block.

    Args:
        patient: both models and the data.
        drop: the block.

    Returns:
        sums over all batches and ranks, of the channels that are left; positions are sub-sampled,
        padding does not count.
    """
    block = patient.graph.block(drop.block)
    kept = patient.kept(block.like)
    kept = torch.arange(block.channels, device="cpu") if kept is None else kept
    sums, samples = Paired(len(kept)), sum(map(batch_size, patient.batches))
    with evaluating(patient.dense), torch.no_grad():
        for batch in patient.batches:
            with Taps(patient.dense, [block], ()) as taps:
                run(patient.dense, batch)
            x, y = (flat(t, block.axis) for t in taps.pairs[block.name])
            wanted = ceil(_ROWS / max(samples, 1))
            at = pick(x.shape[1], wanted, block.name, patient.seed)
            told = real(batch, *x.shape[:2])[:, at]
            sums.add(*(t[:, at][told][:, kept] for t in (x, y)))
    all_sum_([sums.count, sums.first, sums.product])
    return sums


def hand_norms_(patient: Patient) -> None:
    """Let the norm behind a layer that aims past a gap be the norm behind the gap.

    In a post-norm network the stream behind a block is normalised by the block's own norm. The
    norm in front of the gap takes over its scale, so that both sums are read alike.

    Args:
        patient: both models.
    """
    norms = patient.graph.norms
    for front, behind in patient.aims.items():
        if front not in norms:
            continue
        mine = patient.small.get_submodule(norms[front])
        theirs = patient.dense.get_submodule(norms[behind])
        for name, value in theirs.named_parameters():
            put_(mine, name, value)


def unmet(patient: Patient, kind: str) -> tuple[Note, ...]:
    """Name the gaps that no layer in front can stand in for.

    Args:
        patient: both models; `drops` are what is to be made up for.
        kind: on whose behalf.

    Returns:
        one note per gap.
    """
    removed = {drop.block for drop in patient.drops}
    gaps = runs([b for b in patient.graph.blocks if b.name in removed])
    text = "nothing stands in: no layer in front writes to this stream that could be written anew"
    left = (gap[0] for gap in gaps if gap[0].front not in patient.aims)
    return tuple(Note(kind, b.name, None, None, accepted=False, text=text) for b in left)
