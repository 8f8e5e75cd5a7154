"""How far an activation is from being linear on the batch at hand."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.training.base import Memory, Penalty, register, wide

__all__ = ["Linearity"]


@register
class Linearity(Penalty):
    """Pull an activation's inputs to where a straight line per channel would do the same.

    Layer folding teaches each activation a slope between itself and the identity, which needs
    parameters in the user's model. This penalty needs none: it fits the best line per channel,
    `a z + c` with `a = Cov(z, f(z)) / Var(z)`, in closed form on the batch, and returns the
    share of the output's variance that the lines leave unexplained. It is 0 where every channel
    is always on, always off or constant, and 1 where no line helps. Those lines are what goes in
    the activation's place, so the penalty falls exactly as the damage of removing it does.

    The share does not change when a channel's input is scaled, so nothing is gained by shrinking.

    Limits: every channel weighs by its output's variance, not by what the next layer makes of
    it. A batch sees rare events rarely: measure over all calibration data before removing.

    Source: ours, after Dror et al. 2021 (layer folding); the best line under Gaussian inputs is
    Stein's lemma.

    Example:
        >>> z = torch.tensor([[-1.0, 5.0], [1.0, 6.0], [-2.0, 7.0], [2.0, 9.0]])
        >>> Linearity().value(z, z.relu(), Memory(seed=0))
        tensor(0.0217)
        >>> Linearity().value(z[:, 1:], z[:, 1:].relu(), Memory(seed=0))  # never switches
        tensor(0.)
    """

    kind: Literal["linearity"] = "linearity"
    axis: Literal["auto", "second", "last"] = Field(
        default="auto",
        description="which axis holds the channels; `auto` is the last of three (tokens), else "
        "the second",
    )

    def value(self, x: Tensor, y: Tensor, memory: Memory) -> Float[Tensor, ""]:
        """Measure the unexplained share on one batch.

        Args:
            x: what goes into the activation.
            y: what comes out, of the same shape.
            memory: not used.

        Returns:
            a number from 0 to 1.
        """
        z, f = self._centred(x), self._centred(y)
        power = z.square().mean(0)
        # A constant channel has no slope; dividing by one instead of zero keeps gradients finite.
        slope = (z * f).mean(0) / power.where(power > 0, torch.ones_like(power))
        left, total = (f - slope * z).square().mean(0).sum(), f.square().mean(0).sum()
        return left / total.where(total > 0, torch.ones_like(total))

    def _centred(self, x: Tensor) -> Tensor:
        """Lay channels out last and take their means off."""
        last = self.axis == "last" or (self.axis == "auto" and x.dim() == 3)
        x = wide(x)[:, None] if x.dim() == 1 else wide(x)
        moved = x if last else x.movedim(1, -1)
        rows = moved.reshape(-1, moved.shape[-1])
        return rows - rows.mean(0)
