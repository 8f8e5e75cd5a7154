"""Units as probability laws: where their barycenter lies, and how far each is from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.transport import barycenter_gaussian, barycenter_grid, coupling, gaussian

__all__ = ["Gaussians", "Grids", "Laws", "Lines", "Together"]

_STILL = 1e-5  # of the mass may still move: a hundredth of what the temperature blurs


class Laws(ABC):
    """One probability law per unit, in a space where barycenters can be computed."""

    @abstractmethod
    def centre(self, members: Int[Tensor, " members"]) -> Any:
        """Find the Wasserstein barycenter of some units, equally weighted.

        Args:
            members: which units; at least one.

        Returns:
            the barycenter, to be handed to `far`.
        """

    @abstractmethod
    def far(self, centre: Any) -> Float[Tensor, " units"]:
        """Measure W_p from every unit to a barycenter.

        Args:
            centre: what `centre` returned.

        Returns:
            one distance per unit.
        """

    @abstractmethod
    def size(self) -> Float[Tensor, " units"]:
        """Measure W_p from every unit to a channel of zeros; infinite where laws have no size."""


@dataclass(frozen=True)
class Lines(Laws):
    """Laws on the line by their quantiles: everything is exact and needs no solver.

    Args:
        quantiles: sorted, one row per unit.
        p: 2 averages the quantile functions, 1 takes their median.
    """

    quantiles: Float[Tensor, "units levels"]
    p: int

    def centre(self, members: Int[Tensor, " members"]) -> Tensor:
        """Average the quantile functions; for p = 1, take the middle of their median."""
        rows = self.quantiles[members]
        # the lower median alone would favour one of the two middle units
        return rows.mean(0) if self.p == 2 else rows.quantile(0.5, dim=0)

    def far(self, centre: Tensor) -> Float[Tensor, " units"]:
        """Compare quantile functions."""
        gap: Tensor = torch.linalg.vector_norm(self.quantiles - centre, self.p, dim=1)
        share: float = self.quantiles.shape[1] ** (-1 / self.p)
        return gap * share

    def size(self) -> Float[Tensor, " units"]:
        """Take the mean power of the values."""
        return self.far(torch.zeros_like(self.quantiles[0]))


@dataclass(frozen=True)
class Grids(Laws):
    """Masses on a few shared points.

    Args:
        masses: one row per unit, with total 1.
        cost: between the points: distance to the power p.
        p: order of the distance.
        eps: temperature of the barycenter, relative to the mean cost.
    """

    masses: Float[Tensor, "units points"]
    cost: Float[Tensor, "points points"]
    p: int
    eps: float

    def centre(self, members: Int[Tensor, " members"]) -> Tensor:
        """Find the debiased barycenter: a plain entropic one is blurred, and blurred units win."""
        rows = self.masses[members]
        if bool((rows == rows[0]).all()):  # also where masses sit on a single point
            return rows[0]
        return barycenter_grid(rows, self.cost, eps=self.eps, tol=_STILL)

    def far(self, centre: Tensor) -> Float[Tensor, " units"]:
        """Solve one small exact problem per unit: what it shares with the centre stays."""
        costs = [self._cost(row, centre) for row in self.masses]
        return torch.tensor(costs, dtype=torch.float64, device="cpu") ** (1 / self.p)

    def size(self) -> Float[Tensor, " units"]:
        """Compare nothing: every unit has mass one."""
        return torch.full_like(self.masses[:, 0], torch.inf)

    def _cost(self, row: Tensor, centre: Tensor) -> float:
        at, to = row > 0, centre > 0
        total = centre[to].sum() / row[at].sum()
        found = coupling(self.cost[at][:, to], row[at] * total, centre[to], eps=0)
        return max(found.cost, 0.0)


@dataclass(frozen=True)
class Gaussians(Laws):
    """Laws by their mean and covariance alone.

    Args:
        means: one row per unit.
        covs: their covariances.
    """

    means: Float[Tensor, "units d"]
    covs: Float[Tensor, "units d d"]

    def centre(self, members: Int[Tensor, " members"]) -> tuple[Tensor, Tensor]:
        """Find the Bures barycenter."""
        return barycenter_gaussian(self.means[members], self.covs[members])

    def far(self, centre: tuple[Tensor, Tensor]) -> Float[Tensor, " units"]:
        """Measure W_2 between Gaussians in closed form."""
        mean, cov = (part.expand(len(self.means), *part.shape) for part in centre)
        return gaussian(self.means, self.covs, mean, cov).distance

    def size(self) -> Float[Tensor, " units"]:
        """Take the root of the mean square."""
        power: Tensor = self.means.square().sum(1) + self.covs.diagonal(dim1=1, dim2=2).sum(1)
        return power.clamp_min(0).sqrt()


@dataclass(frozen=True)
class Together(Laws):
    """Several laws per unit, such as one per layer that writes it.

    Args:
        parts: laws of the same units.
        p: how their distances add up.
    """

    parts: Sequence[Laws]
    p: int

    def centre(self, members: Int[Tensor, " members"]) -> list[Any]:
        """Find every part's own barycenter."""
        return [part.centre(members) for part in self.parts]

    def far(self, centre: list[Any]) -> Float[Tensor, " units"]:
        """Average the powers of the parts' distances."""
        pairs = zip(self.parts, centre, strict=True)
        return torch.stack([part.far(c) ** self.p for part, c in pairs]).mean(0) ** (1 / self.p)

    def size(self) -> Float[Tensor, " units"]:
        """Average the powers of the parts' sizes."""
        sizes = torch.stack([part.size() for part in self.parts])
        return (sizes**self.p).mean(0) ** (1 / self.p)
