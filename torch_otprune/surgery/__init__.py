"""A plan carried out on a model, and the way back."""

from torch_otprune.surgery.cut import check_cuts, cut_, put_
from torch_otprune.surgery.oracle import disagreement, gap, masked
from torch_otprune.surgery.undo import Snapshot

__all__ = ["Snapshot", "check_cuts", "cut_", "disagreement", "gap", "masked", "put_"]
