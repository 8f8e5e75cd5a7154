"""What is known about removable blocks and activations when they are ranked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["ChainEvidence", "SiteEvidence", "SiteFold"]


@dataclass(frozen=True)
class SiteFold:
    """How one rectifier's units switch along straight paths between samples: means over paths.

    A fold score is the share of switches that do not add to the largest distance from the start:
    0 where no unit ever switches back on balance, towards 1 where all is undone.

    Args:
        switch: switches per unit and path.
        score: fold score of this rectifier's own units.
        increment: what the rectifier adds to the fold score of all in front of it; may be negative.
        weighted_switch: the same as `switch`, units counted by how much they bend the next layers.
        weighted_score: the same as `score`, likewise.
        weighted_increment: the same as `increment`, likewise.
        paths: how many.
    """

    switch: float
    score: float
    increment: float
    weighted_switch: float
    weighted_score: float
    weighted_increment: float
    paths: int


@dataclass(frozen=True)
class SiteEvidence:
    """One activation, as a criterion sees it: pooled sums over all samples and positions.

    Args:
        name: of the activation in the graph.
        function: `relu`, `relu6`, `gelu`, `silu`, ...: the module's class in lower case; for a
            function, that of the module that does the same.
        count: observations per channel.
        positive: share of inputs above zero.
        nonnegative: share of inputs not below zero.
        capped: share of inputs at or above six, where a ReLU6 is constant.
        mean: mean input.
        var: variance of the input.
        out_mean: mean output.
        out_var: variance of the output.
        cov: covariance of input and output.
        norm: shift and absolute scale of a batch-norm whose output is the input as it is; None
            where there is none, or something is added in between.
        reads: squared norm of the next linear layers' weights on each channel; None where it
            cannot be told.
        magnitude: mean absolute non-zero weight of the linear layer in front; None without one.
        fold: how its units switch along paths between samples; None where no criterion asked.
    """

    name: str
    function: str
    count: int
    positive: Float[Tensor, " channels"]
    nonnegative: Float[Tensor, " channels"]
    capped: Float[Tensor, " channels"]
    mean: Float[Tensor, " channels"]
    var: Float[Tensor, " channels"]
    out_mean: Float[Tensor, " channels"]
    out_var: Float[Tensor, " channels"]
    cov: Float[Tensor, " channels"]
    norm: tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]] | None
    reads: Float[Tensor, " channels"] | None
    magnitude: float | None
    fold: SiteFold | None = None


@dataclass(frozen=True)
class ChainEvidence:
    """Consecutive removable blocks of one shape. Rows are paired: one sample, one position each.

    Block b reads `points[b]` and writes `points[b + 1]`. Everything in float64.

    Args:
        name: the chain, by its first block.
        blocks: names in order of execution.
        points: the stream before the first block, between the blocks, and after the last.
        sample: which calibration sample a row comes from.
        last: whether a row is the last position of its sample.
        writers: per block, the input of the last linear layer in front of it that writes to the
            stream, on the same rows; None where there is none in the chain's reach.
        feel: how much the network's squared output grows with a squared error in each channel of
            a point, per sample; ones where it was not measured.
        power: the network's squared output, per sample; 1 where it was not measured.
        sites: the activations inside each block; none where they were not looked at.
        weights: mean absolute weight of each block's linear layers.
        trial: removes the blocks of these numbers from the real network and measures the squared
            change of its output, as a share of its power; slow.
        seed: the policy's seed.
        mended: the same as `trial`, after a quick run of the rule's own repair on other samples;
            slower still; None where it was not offered.
    """

    name: str
    blocks: tuple[str, ...]
    points: Float[Tensor, "points rows channels"]
    sample: Int[Tensor, " rows"]
    last: Bool[Tensor, " rows"]
    writers: tuple[Float[Tensor, "rows _"] | None, ...]
    feel: Float[Tensor, "points channels"]
    power: float
    sites: tuple[tuple[SiteEvidence, ...], ...]
    weights: Float[Tensor, " blocks"]
    trial: Callable[[Collection[int]], float]
    seed: int
    mended: Callable[[Collection[int]], float] | None = None

    def part(self, names: Sequence[str]) -> ChainEvidence:
        """Look at some blocks that follow one another.

        Args:
            names: blocks of this chain, in order and without a gap.

        Returns:
            the same evidence about these alone.
        """
        first, stop = self.blocks.index(names[0]), self.blocks.index(names[-1]) + 1
        if (first, stop) == (0, len(self.blocks)):
            return self
        whole, mended = self.trial, self.mended
        return replace(
            self,
            name=names[0],
            blocks=self.blocks[first:stop],
            points=self.points[first : stop + 1],
            writers=self.writers[first:stop],
            feel=self.feel[first : stop + 1],
            sites=self.sites[first:stop],
            weights=self.weights[first:stop],
            trial=lambda gone: whole([number + first for number in gone]),
            mended=None
            if mended is None
            else lambda gone: mended([number + first for number in gone]),
        )
