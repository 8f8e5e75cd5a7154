"""What works while the user trains: penalties that collapse layers, and a pruning schedule."""

from torch_otprune.training.base import Memory, Penalty, register
from torch_otprune.training.distill import Distill
from torch_otprune.training.entropy import EntropySchedule
from torch_otprune.training.linearity import Linearity
from torch_otprune.training.max_sliced import MaxSliced
from torch_otprune.training.watch import Pressure

__all__ = [
    "Distill",
    "EntropySchedule",
    "Linearity",
    "MaxSliced",
    "Memory",
    "Penalty",
    "Pressure",
    "register",
]
