"""A cut model and its dense original in, a closer one out; one file each."""

from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.bias import Bias
from torch_otprune.repair.convex_refit import ConvexRefit
from torch_otprune.repair.coupling import Coupling
from torch_otprune.repair.domain_map import DomainMap
from torch_otprune.repair.flow import Flow
from torch_otprune.repair.least_squares import LeastSquares
from torch_otprune.repair.none import NoRepair
from torch_otprune.repair.norm import Norm
from torch_otprune.repair.reconstruct import Reconstruct
from torch_otprune.repair.recurrent import Recurrent
from torch_otprune.repair.sparse_map import SparseMap

__all__ = [
    "Bias",
    "ConvexRefit",
    "Coupling",
    "DomainMap",
    "Flow",
    "LeastSquares",
    "NoRepair",
    "Norm",
    "Note",
    "Patient",
    "Reconstruct",
    "Recurrent",
    "Repair",
    "SparseMap",
    "register",
]
