"""The entropic map under an elastic cost, whose displacements have exact zeros."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.maps.elastic import Elastic
from torch_otprune.maps.gap import cost_matrix
from torch_otprune.transport import coupling

__all__ = ["MBO", "fit_mbo"]

_BLOCK = 2**22  # numbers of pairwise displacements held at a time


class MBO(nn.Module):
    """Map points by T(x) = x − prox(∇f(x)), with f the soft minimum over the targets.

    Args:
        targets: points that the plan reaches.
        tilt: log weight plus potential over eps of every target.
        eps: temperature, in the unit of the cost.
        cost: of a displacement.

    Source: Cuturi, Klein & Ablin 2023, equations for the entropic map of h.
    """

    targets: Tensor
    tilt: Tensor

    def __init__(
        self, targets: Float[Tensor, "m d"], tilt: Float[Tensor, " m"], eps: float, *, cost: Elastic
    ) -> None:
        super().__init__()
        self.eps, self.cost = eps, cost
        self.register_buffer("targets", targets)
        self.register_buffer("tilt", tilt)

    def gradient(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Differentiate the soft minimum."""
        step = max(1, _BLOCK // max(self.targets.numel(), 1))
        return torch.cat([self._some(rows) for rows in x.split(step)])

    def potential(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Give the soft minimum itself."""
        costs = cost_matrix(x, self.targets, self.cost)
        return -self.eps * torch.logsumexp(self.tilt - costs / self.eps, dim=1)

    def _some(self, x: Tensor) -> Tensor:
        share = torch.softmax(self.tilt - cost_matrix(x, self.targets, self.cost) / self.eps, dim=1)
        bent = self.cost.slope(x[:, None] - self.targets[None])
        return x - share @ self.targets + torch.einsum("nm,nmd->nd", share, bent)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Map points; a coordinate that does not move keeps its bits."""
        flat = x.reshape(-1, x.shape[-1])
        moved: Tensor = flat - self.cost.prox(self.gradient(flat.to(self.targets))).to(flat)
        return moved.reshape(x.shape)


def fit_mbo(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], cost: Elastic, *, eps: float = 0.05
) -> MBO:
    """Couple two clouds and make the map of the plan's potential.

    Args:
        x: source.
        y: target.
        cost: of a displacement.
        eps: temperature relative to the mean cost.

    Returns:
        the map; a new point costs one row of the plan.
    """
    found = coupling(cost_matrix(x, y, cost), eps=eps, tol=1e-4)
    _, g = found.potentials
    return MBO(y, found.b.log() + g / found.eps, found.eps, cost=cost)
