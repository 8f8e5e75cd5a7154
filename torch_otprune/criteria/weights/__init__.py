"""Criteria that choose single weights; importing this fills the table."""

from torch_otprune.criteria.weights.alps import ALPS
from torch_otprune.criteria.weights.base import (
    Certificate,
    Samples,
    Thinned,
    WeightCase,
    WeightCriterion,
    WeightNeed,
    register,
)
from torch_otprune.criteria.weights.dtp import DTP
from torch_otprune.criteria.weights.magnitude import Magnitude
from torch_otprune.criteria.weights.net_trim import NetTrim
from torch_otprune.criteria.weights.ntk import NTK
from torch_otprune.criteria.weights.sparsegpt import SparseGPT
from torch_otprune.criteria.weights.wanda import Wanda

__all__ = [
    "ALPS",
    "DTP",
    "NTK",
    "Certificate",
    "Magnitude",
    "NetTrim",
    "Samples",
    "SparseGPT",
    "Thinned",
    "Wanda",
    "WeightCase",
    "WeightCriterion",
    "WeightNeed",
    "register",
]
