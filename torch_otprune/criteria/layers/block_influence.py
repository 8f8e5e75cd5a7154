"""How much a block turns the stream."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.layers.base import ScoreLayerCriterion, register
from torch_otprune.criteria.layers.stream import stream
from torch_otprune.statistics.depth import ChainEvidence

__all__ = ["BlockInfluence", "directed"]


@register
class BlockInfluence(ScoreLayerCriterion):
    """Keep the blocks that turn the stream: one minus the mean cosine of input and output.

    Limits: blind to the length of a row, and to what the rest of the network reads of it.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than
    You Expect" (block influence).
    """

    kind: Literal["block_influence"] = "block_influence"

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Average over the rows, a row and its image compared."""
        unit = directed(stream(evidence))
        # Half a squared chord is one minus the cosine, without the cancellation.
        score: Tensor = (unit[1:] - unit[:-1]).square().sum(2).mean(1) / 2
        silent = (unit == 0).all(2).double()
        return score + (silent[1:] - silent[:-1]).abs().mean(1) / 2


def directed(
    points: Float[Tensor, "points rows channels"],
) -> Float[Tensor, "points rows channels"]:
    """Scale every row to length one; rows of zeros stay.

    Args:
        points: the stream.

    Returns:
        directions.
    """
    top = points.abs().amax(2, keepdim=True)
    points = points / torch.where(top > 0, top, 1.0)  # squares must not overflow
    length = points.norm(dim=2, keepdim=True)
    return points / torch.where(length > 0, length, 1.0)
