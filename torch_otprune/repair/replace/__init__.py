"""What may stand where a block was; importing this fills the table."""

from torch_otprune.plan.replacement import Replacement, register
from torch_otprune.repair.replace.affine import Affine, left_to_repair
from torch_otprune.repair.replace.base import Fitted
from torch_otprune.repair.replace.bures import Bures
from torch_otprune.repair.replace.identity import Identity
from torch_otprune.repair.replace.low_rank import LowRank
from torch_otprune.repair.replace.scale import Scale

__all__ = [
    "Affine",
    "Bures",
    "Fitted",
    "Identity",
    "LowRank",
    "Replacement",
    "Scale",
    "left_to_repair",
    "register",
]
