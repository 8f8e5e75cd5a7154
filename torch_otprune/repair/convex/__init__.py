"""A hidden layer, its rectifier and the layer behind it, refitted by a convex program."""

from torch_otprune.repair.convex.head import ConvexHead, Refit
from torch_otprune.repair.convex.loss import LOSSES, LossName
from torch_otprune.repair.convex.program import Program, Solved, solve

__all__ = ["LOSSES", "ConvexHead", "LossName", "Program", "Refit", "Solved", "solve"]
