"""Two measures in, a cost, a coupling or a map out; the only door to geomloss and pykeops."""

from __future__ import annotations

from torch_otprune.transport.barycenter import barycenter_1d, barycenter_gaussian, barycenter_grid
from torch_otprune.transport.cost import ground_cost, sqdist
from torch_otprune.transport.couple import Coupling
from torch_otprune.transport.couplings import coupling, coupling_points, couplings
from torch_otprune.transport.critic import Critic, critic
from torch_otprune.transport.dispatch import explain
from torch_otprune.transport.distance import wasserstein
from torch_otprune.transport.divergence import Divergence, divergence, divergence_report
from torch_otprune.transport.estimate import Estimate, estimate, paired_distance
from torch_otprune.transport.exact import assignment
from torch_otprune.transport.facility import FacilityLocation, facility_location
from torch_otprune.transport.flowtree import Flowtree, candidates, flowtree
from torch_otprune.transport.gaussian import GaussianMap, gaussian, gaussian_points
from torch_otprune.transport.line import pairwise_1d, quantiles, wasserstein_1d
from torch_otprune.transport.pivoted import Pivots, pivoted_cholesky
from torch_otprune.transport.reduce import principal
from torch_otprune.transport.sliced import (
    MaxSliced,
    max_sliced,
    sliced,
    sliced_features,
    sliced_kernel,
)
from torch_otprune.transport.sparse import SparseFacility, facility_location_sparse
from torch_otprune.transport.swaps import improve, lower_bound
from torch_otprune.transport.topk import soft_topk
from torch_otprune.transport.wide import Neighbours, nearest

__all__ = [
    "Coupling",
    "Critic",
    "Divergence",
    "Estimate",
    "FacilityLocation",
    "Flowtree",
    "GaussianMap",
    "MaxSliced",
    "Neighbours",
    "Pivots",
    "SparseFacility",
    "assignment",
    "barycenter_1d",
    "barycenter_gaussian",
    "barycenter_grid",
    "candidates",
    "coupling",
    "coupling_points",
    "couplings",
    "critic",
    "divergence",
    "divergence_report",
    "estimate",
    "explain",
    "facility_location",
    "facility_location_sparse",
    "flowtree",
    "gaussian",
    "gaussian_points",
    "ground_cost",
    "improve",
    "lower_bound",
    "max_sliced",
    "nearest",
    "paired_distance",
    "pairwise_1d",
    "pivoted_cholesky",
    "principal",
    "quantiles",
    "sliced",
    "sliced_features",
    "sliced_kernel",
    "soft_topk",
    "sqdist",
    "wasserstein",
    "wasserstein_1d",
]
