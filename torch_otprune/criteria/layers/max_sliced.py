"""How far a block moves the distribution of its input, in the direction where it shows most."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.layers.base import ScoreLayerCriterion, register
from torch_otprune.criteria.layers.stream import centred, relative, stream
from torch_otprune.statistics.depth import ChainEvidence
from torch_otprune.transport import MaxSliced as Found
from torch_otprune.transport import max_sliced, wasserstein_1d

__all__ = ["MaxSliced"]


@register
class MaxSliced(ScoreLayerCriterion):
    """Keep the blocks that move the distribution of the stream in some direction.

    The distance is W_p between the projections of the block's input and of its output, in the
    direction where it is largest. Directions that the data suggest are tried first: the shift of
    the mean, the largest changes of spread and the main directions of both clouds together; from
    these and from random ones the search climbs with its matching frozen. The distance is divided
    by the input's spread, so that a stream that merely shrinks looks no closer.

    Limits: a block that only permutes the rows scores 0, though it is no identity; for ranking a
    trained network prefer `transport` or `block_influence`, which know the pairs. The search finds
    a local maximum, a lower bound.

    Source: Quétu et al. 2025, "LaCoOT: Layer Collapse through Optimal Transport", for the
    distance; the directions and the division are ours. `lacoot` is the score as published.
    """

    kind: Literal["max_sliced"] = "max_sliced"
    p: float = Field(default=2.0, ge=1.0, description="order of the distance")
    steps: int = Field(default=20, ge=0, description="ascent steps from each start")
    restarts: int = Field(default=8, ge=1, description="random starts beside the informed ones")
    principal: int = Field(default=8, ge=1, description="main directions to search in as well")
    relative: bool = Field(default=True, description="divide by the spread of the input")

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Measure every block's input against its output."""
        points = stream(evidence)
        found = [self._block(evidence, b) for b in range(len(points) - 1)]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def _block(self, evidence: ChainEvidence, block: int) -> float:
        x, y = evidence.points[block], evidence.points[block + 1]
        basis = _main_directions(torch.cat([x, y]), self.principal)
        main_x, main_y = x @ basis, y @ basis
        everywhere, inside = self._search(x, y, evidence), self._search(main_x, main_y, evidence)
        axes = wasserstein_1d(main_x, main_y, p=self.p)
        found = [
            (everywhere.distance, everywhere.direction),
            (inside.distance, basis @ inside.direction),
            (axes.max(), basis[:, axes.argmax()]),
        ]
        distance, theta = max(found, key=lambda pair: float(pair[0]))
        if not self.relative:
            return float(distance)
        return relative(float(distance), _spread(x, theta), evidence, block)

    def _search(self, x: Tensor, y: Tensor, evidence: ChainEvidence) -> Found:
        return max_sliced(
            x, y, p=self.p, steps=self.steps, restarts=self.restarts, seed=evidence.seed
        )


def _spread(x: Float[Tensor, "rows channels"], theta: Float[Tensor, " channels"]) -> float:
    """Take the input's spread along a direction, or a channel's average where that is larger."""
    x = centred(x)
    # In a direction that the input leaves empty the smallest move would be infinitely large.
    along, channels = (x @ theta).square().mean(), x.square().mean(0)
    live = channels > 0
    average = channels[live].mean() if bool(live.any()) else along
    return float(torch.maximum(along, average).sqrt())


def _main_directions(
    x: Float[Tensor, "rows channels"], count: int
) -> Float[Tensor, "channels found"]:
    """Find the main directions of a cloud by subspace iterations; orthonormal."""
    generator = torch.Generator().manual_seed(0)
    count = min(count, x.shape[1])
    start = torch.randn(
        x.shape[1], count, generator=generator, dtype=torch.float64, device="cpu"
    ).to(x)
    basis: Tensor = torch.linalg.qr(start)[0]
    x = centred(x)
    for _ in range(6):
        grown = x.T @ (x @ basis)
        top = grown.abs().max()
        if not bool(top > 0):
            break
        basis = torch.linalg.qr(grown / top)[0]
    return basis
