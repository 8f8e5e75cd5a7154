"""What may stand where a block was; importing this fills the table."""

from torch_otprune.plan.replacement import Replacement, register
from torch_otprune.repair.replace.affine import Affine, left_to_repair
from torch_otprune.repair.replace.base import Fitted
from torch_otprune.repair.replace.bures import Bures
from torch_otprune.repair.replace.identity import Identity
from torch_otprune.repair.replace.low_rank import LowRank
from torch_otprune.repair.replace.mapped import Mapped
from torch_otprune.repair.replace.monge_map import MongeMap
from torch_otprune.repair.replace.monge_net import MongeNet
from torch_otprune.repair.replace.scale import Scale
from torch_otprune.repair.replace.sparse_map import SparseMap
from torch_otprune.repair.replace.transport_map import AnyMap

__all__ = [
    "Affine",
    "AnyMap",
    "Bures",
    "Fitted",
    "Identity",
    "LowRank",
    "Mapped",
    "MongeMap",
    "MongeNet",
    "Replacement",
    "Scale",
    "SparseMap",
    "left_to_repair",
    "register",
]
