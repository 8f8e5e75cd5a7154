"""How far a block moves the mean and covariance of the stream."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.layers.base import ScoreLayerCriterion, register
from torch_otprune.criteria.layers.stream import centred, relative, stream
from torch_otprune.statistics.depth import ChainEvidence
from torch_otprune.transport import gaussian_points

__all__ = ["Gaussian"]


@register
class Gaussian(ScoreLayerCriterion):
    """Keep the blocks that change the mean or the covariance of the stream.

    The score is W_2 between the Gaussians with the moments of the block's input and output
    (Bures), divided by the root of the input's total variance.

    Limits: moments only: a block that permutes the rows, or changes no more than the shape of the
    distribution, scores 0. It is a lower bound of the true W_2.

    Source: Gelbrich 1990 for the distance; its use to rank blocks is ours.
    """

    kind: Literal["gaussian"] = "gaussian"

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Measure every block's input against its output."""
        points = stream(evidence)
        found = []
        for block, (x, y) in enumerate(pairwise(points)):
            spread = float(centred(x).square().sum(1).mean().sqrt())
            # Equal clouds would show the root of a rounding error.
            distance = 0.0 if torch.equal(x, y) else float(gaussian_points(x, y).distance)
            found.append(relative(distance, spread, evidence, block))
        return torch.tensor(found, dtype=torch.float64, device="cpu")
