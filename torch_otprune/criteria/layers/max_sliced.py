"""How far a block moves the distribution of its input, in the direction where it shows most."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from torch_otprune.criteria.layers.base import ScoreLayerCriterion, register
from torch_otprune.criteria.layers.look import Look, rising
from torch_otprune.criteria.layers.stream import centred, relative, stream
from torch_otprune.errors import PolicyError
from torch_otprune.statistics.depth import ChainEvidence
from torch_otprune.transport import Critic, critic, max_sliced, wasserstein_1d
from torch_otprune.transport import MaxSliced as Found

__all__ = ["MaxSliced"]


@register
class MaxSliced(ScoreLayerCriterion):
    """Keep the blocks that move the distribution of the stream in some direction.

    The distance is W_p between the projections of the block's input and of its output, in the
    direction where it is largest. Directions that the data suggest are tried first: the shift of
    the mean, the largest changes of spread and the main directions of both clouds together; from
    these and from random ones the search climbs with its matching frozen. The distance is divided
    by the input's spread, so that a stream that merely shrinks looks no closer.

    With `distance="critic"` the distance is W_1 between the laws, as a learnt 1-Lipschitz function
    bounds it from below, or max-sliced where that finds more. Its time does not grow with the
    rows, so it is for laws too large for Sinkhorn. The plan's notes hold, block by block, the
    critic, max-sliced and Sinkhorn on a subsample, with what halves of one cloud show.

    Limits: a block that only permutes the rows scores 0, though it is no identity; for ranking a
    trained network prefer `transport` or `block_influence`, which know the pairs. The search finds
    a local maximum, a lower bound.

    Source: Quétu et al. 2025, "LaCoOT: Layer Collapse through Optimal Transport", for the
    distance; the directions and the division are ours. `lacoot` is the score as published.
    """

    kind: Literal["max_sliced"] = "max_sliced"
    p: float | None = Field(
        default=None, ge=1.0, description="order of the distance; null is 2, and 1 for a critic"
    )
    steps: int = Field(default=20, ge=0, description="ascent steps from each start")
    restarts: int = Field(default=8, ge=1, description="random starts beside the informed ones")
    principal: int = Field(default=8, ge=1, description="main directions to search in as well")
    distance: Literal["max_sliced", "critic"] = Field(
        default="max_sliced", description="the worst direction, or a learnt bound of W_1"
    )
    training: int = Field(default=300, ge=1, description="steps of the critic")
    sample: int = Field(
        default=1024, ge=4, description="rows for Sinkhorn, which the critic's notes report"
    )
    relative: bool = Field(default=True, description="divide by the spread of the input")

    @model_validator(mode="after")
    def _one_order(self) -> MaxSliced:
        if self.distance == "critic" and self.p not in (None, 1):
            raise PolicyError(
                f"a critic measures W_1, and p is {self.p}.",
                where="criterion max_sliced, settings distance and p",
                fix="leave p out, or use distance='max_sliced'.",
            )
        return self

    @property
    def _order(self) -> float:
        return 2.0 if self.p is None else self.p

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Measure every block's input against its output."""
        points = stream(evidence)
        if self.distance == "critic":
            return self._bounds(evidence, self._critics(evidence))
        found = [self._block(evidence, b) for b in range(len(points) - 1)]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def told(
        self, chains: Sequence[ChainEvidence], *, look: Look | None = None, count: int | None = None
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Price, and with a critic say what stands beside each."""
        if self.distance != "critic":
            return super().told(chains, look=look, count=count)
        prices, notes = dict[str, float](), dict[str, str]()
        for evidence in chains:
            critics = self._critics(evidence)
            scores = dict(
                zip(evidence.blocks, self._bounds(evidence, critics).tolist(), strict=True)
            )
            prices |= rising(sorted(scores.items(), key=lambda pair: pair[1]))
            notes |= dict(zip(evidence.blocks, map(_line, critics), strict=True))
        return prices, notes

    def _critics(self, evidence: ChainEvidence) -> list[Critic]:
        points = stream(evidence)
        return [
            critic(x, y, steps=self.training, sample=self.sample, seed=evidence.seed)
            for x, y in pairwise(points)
        ]

    def _bounds(self, evidence: ChainEvidence, critics: Sequence[Critic]) -> Tensor:
        """Take each block's better bound, as a share of its input's radius."""
        found = []
        for block, made in enumerate(critics):
            radius = float(centred(evidence.points[block]).square().sum(1).mean().sqrt())
            distance = (
                relative(made.bound, radius, evidence, block) if self.relative else made.bound
            )
            found.append(distance)
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def _block(self, evidence: ChainEvidence, block: int) -> float:
        x, y = evidence.points[block], evidence.points[block + 1]
        basis = _main_directions(torch.cat([x, y]), self.principal)
        main_x, main_y = x @ basis, y @ basis
        everywhere, inside = self._search(x, y, evidence), self._search(main_x, main_y, evidence)
        axes = wasserstein_1d(main_x, main_y, p=self._order)
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
            x, y, p=self._order, steps=self.steps, restarts=self.restarts, seed=evidence.seed
        )


def _line(made: Critic) -> str:
    """Put the three numbers into one line of a plan."""
    said = f"W1 critic {float(made.distance):.4g}, on fresh rows {made.fresh:.4g}; max-sliced "
    said += f"{made.max_sliced:.4g}; Sinkhorn {made.sinkhorn:.4g} on {made.sample} rows, "
    said += f"{made.null:.4g} between halves of the input"
    return said + ("; the critic learnt too little, take more steps" if made.underfit else "")


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
