"""LaCoOT's score as published, the yardstick for distances between distributions."""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.layers.base import ScoreLayerCriterion, register
from torch_otprune.criteria.layers.stream import stream
from torch_otprune.statistics.depth import ChainEvidence
from torch_otprune.transport import wasserstein_1d

__all__ = ["LaCoOT"]


@register
class LaCoOT(ScoreLayerCriterion):
    """Keep the blocks whose input and output differ in one of a few random directions.

    Limits: random directions are blind where there are many channels: a shift of 5 in one of
    4 096 channels shows as about 0.2. In the unit of the stream, so a stream that shrinks looks
    closer. `max_sliced` mends both. The paper's rows are whole flattened feature maps; here a row
    is one position, as everywhere in the evidence.

    Source: Quétu et al. 2025, "LaCoOT: Layer Collapse through Optimal Transport": W_2, the
    largest over 50 directions drawn anew for each block, without ascent.
    """

    kind: Literal["lacoot"] = "lacoot"
    directions: int = Field(default=50, ge=1, description="random directions per block")

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Measure every block's input against its output."""
        points = stream(evidence)
        found = []
        for block, x, y in zip(evidence.blocks, points[:-1], points[1:], strict=True):
            seed = evidence.seed ^ zlib.crc32(block.encode())
            generator = torch.Generator().manual_seed(seed)
            draw = torch.randn(x.shape[1], self.directions, generator=generator, device="cpu")
            theta = (draw / draw.norm(dim=0)).to(x)
            found.append(wasserstein_1d(x @ theta, y @ theta, p=2.0).max())
        return torch.stack(found)
