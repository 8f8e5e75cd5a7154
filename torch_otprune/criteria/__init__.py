"""Statistics in, a ranking of units and its cost curve out; one file each."""

from torch_otprune.criteria.activation import Activation
from torch_otprune.criteria.base import Criterion, Need, Ranking, ScoreCriterion, register
from torch_otprune.criteria.bn_scale import BNScale
from torch_otprune.criteria.cpot import CPOT
from torch_otprune.criteria.dtp import DTP
from torch_otprune.criteria.fpgm import FPGM
from torch_otprune.criteria.magnitude import Magnitude
from torch_otprune.criteria.net_trim import NetTrim
from torch_otprune.criteria.ntk import NTK
from torch_otprune.criteria.obs import OBS
from torch_otprune.criteria.random import Random
from torch_otprune.criteria.sliced_kernel import SlicedKernel
from torch_otprune.criteria.taylor import Taylor
from torch_otprune.criteria.transport import Transport

__all__ = [
    "CPOT",
    "DTP",
    "FPGM",
    "NTK",
    "OBS",
    "Activation",
    "BNScale",
    "Criterion",
    "Magnitude",
    "Need",
    "NetTrim",
    "Random",
    "Ranking",
    "ScoreCriterion",
    "SlicedKernel",
    "Taylor",
    "Transport",
    "register",
]
