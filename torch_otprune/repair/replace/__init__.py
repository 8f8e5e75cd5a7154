"""What may stand where a block was; importing this fills the table."""

from torch_otprune.plan.replacement import Replacement, register
from torch_otprune.repair.replace.affine import Affine
from torch_otprune.repair.replace.identity import Identity

__all__ = ["Affine", "Identity", "Replacement", "register"]
