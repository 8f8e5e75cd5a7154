"""Costs of a displacement that ask for few moved coordinates, with their exact proximal steps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from torch_otprune.policy.base import Declaration, problem

__all__ = ["CONVEX_L0", "Elastic"]

CONVEX_L0 = math.exp(1.5) / 2  # weight over scale squared: least curvature of h is 0 there
_HALVINGS = 70  # of an interval, until float64 has no more digits


class Elastic(Declaration):
    """The cost h(z) = |z|² / 2 + weight · τ(z) of a displacement z.

    | `reg` | τ | what its proximal step does |
    |---|---|---|
    | `l1` | sum of absolute values | shrinks all, exact zeros |
    | `l0` | sum of 1 − exp(−z² / 2 scale²) | leaves large ones alone, no exact zeros |
    | `stvs` | vanishing shrinkage | shrinks large ones little, exact zeros |
    | `koverlap` | half the squared k-support norm | zeros beyond about k, little shrinkage |

    Limits: `l0` is convex in sum only up to weight = 2.24 scale², and refused beyond: the map
    would not be unique. `stvs` has its closed step at weight 1 alone, so `scale` is what to tune.

    Source: Cuturi, Klein & Ablin 2023 for h, its map and `stvs` (after Schreck et al. 2016);
    Argyriou et al. 2012 for `koverlap`, solved here over the capped simplex of its variational
    form; Chen, Xie & Zhang 2025 for `l0` as a penalty. The threshold of `l0` is ours.

    Example:
        >>> Elastic(reg="l1", weight=1.0).prox(torch.tensor([0.5, -3.0]))
        tensor([ 0., -2.])
    """

    reg: Literal["l0", "l1", "stvs", "koverlap"] = "l1"
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="of the penalty")
    scale: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="length of `l0` and `stvs`"
    )
    k: int = Field(default=1, ge=1, description="coordinates that `koverlap` lets move freely")

    @model_validator(mode="after")
    def _convex(self) -> Self:
        most = CONVEX_L0 * self.scale**2
        if self.reg == "l0" and self.weight > most:
            raise problem(
                f"a weight of {self.weight:g} is past the convexity threshold {most:.4g}.",
                fix=f"use a weight up to {most:.4g}, or a scale of at least "
                f"{math.sqrt(self.weight / CONVEX_L0):.4g}.",
                key="weight",
            )
        if self.reg == "stvs" and self.weight != 1:
            raise problem(
                f"stvs has no closed proximal step at weight {self.weight:g}.",
                fix="leave the weight at 1 and change `scale`, whose square is the weight.",
                key="weight",
            )
        return self

    def penalty(self, z: Float[Tensor, "*points d"]) -> Float[Tensor, "*points"]:
        """Measure τ, without its weight.

        Args:
            z: displacements, in the unit of the points.

        Returns:
            one value each.
        """
        if self.reg == "l1":
            return z.abs().sum(-1)
        if self.reg == "l0":
            return (1 - (-z.square() / (2 * self.scale**2)).exp()).sum(-1)
        if self.reg == "stvs":
            bend = torch.asinh(z.abs() / (2 * self.scale))
            return self.scale**2 * (bend + 0.5 - 0.5 * (-2 * bend).exp()).sum(-1)
        share = self._free(z.detach())
        part = z.square() / share.where(share > 0, share.new_ones(()))
        return part.sum(-1) / 2

    def value(self, z: Float[Tensor, "*points d"]) -> Float[Tensor, "*points"]:
        """Measure h."""
        return z.square().sum(-1) / 2 + self.weight * self.penalty(z)

    def slope(self, z: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Differentiate weight · τ; 0 where it has a kink."""
        if self.reg == "l1":
            return self.weight * z.sign()
        if self.reg == "l0":
            bell = (-z.square() / (2 * self.scale**2)).exp()
            return self.weight / self.scale**2 * z * bell
        if self.reg == "stvs":
            return self.scale * (-torch.asinh(z.abs() / (2 * self.scale))).exp() * z.sign()
        share = self._free(z)
        return self.weight * z / share.where(share > 0, share.new_ones(()))

    def prox(self, v: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Minimise |z − v|² / 2 + weight · τ(z) over z, exactly."""
        if self.weight == 0:
            return v
        if self.reg == "l1":
            return v.sign() * (v.abs() - self.weight).clamp(min=0)
        if self.reg == "stvs":
            safe = v.where(v != 0, v.new_ones(()))
            return v * (1 - self.scale**2 / safe.square()).clamp(min=0)
        if self.reg == "l0":
            return self._smooth(v)
        share = self._shares(v, self.weight)
        return v * share / (share + self.weight)

    def _smooth(self, v: Tensor) -> Tensor:
        """Solve z + slope(z) = |v|, whose left side grows below the threshold, by halving."""
        low, high = torch.zeros_like(v), v.abs()
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = middle + self.slope(middle) > v.abs()
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return v.sign() * (low + high) / 2

    def _free(self, z: Tensor) -> Tensor:
        """Split k units of freedom so that the sum of z² / share is least: clip(s |z|, 0, 1)."""
        size, k = z.abs(), min(self.k, z.shape[-1])
        sorted_, _ = size.sort(dim=-1, descending=True)
        behind = sorted_.flip(-1).cumsum(-1).flip(-1)[..., :k]  # from the j-th largest on
        left = torch.arange(k, 0, -1, dtype=z.dtype, device=z.device)
        rate = left / behind.where(behind > 0, behind.new_full((), 1e-300))
        # With j coordinates wholly free: right for the first j whose next one is not.
        fits = rate * sorted_[..., :k] <= 1 + 1e-12
        at = fits.to(torch.int8).argmax(-1, keepdim=True)
        chosen = rate.gather(-1, at).where(fits.any(-1, keepdim=True), rate.new_full((), 1e300))
        return (chosen * size).clamp(0, 1)

    def _shares(self, v: Tensor, weight: float) -> Tensor:
        """Split k units of freedom: clip(s |v| − weight, 0, 1), with s such that they add up."""
        size, k = v.abs(), min(self.k, v.shape[-1])
        # k coordinates are free there; the least one of all may be so small that halving never ends
        last = size.topk(k, dim=-1).values[..., -1:]
        few = last == 0
        high = (1 + weight) / last.where(~few, last.new_ones(()))
        low = torch.zeros_like(high)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = (middle * size - weight).clamp(0, 1).sum(-1, keepdim=True) > k
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return torch.where(few, (size > 0).to(size), (high * size - weight).clamp(0, 1))
