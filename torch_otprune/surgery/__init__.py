"""A plan carried out on a model, and the way back."""

from torch_otprune.surgery.check import check_plan, check_slices, tolerance
from torch_otprune.surgery.compact import compact_, renamed, take_out_
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import check_cuts, cut_, merged, put_
from torch_otprune.surgery.exchange import exchange_, gone
from torch_otprune.surgery.oracle import compared, disagreement, gap, masked
from torch_otprune.surgery.reload import unlike_config
from torch_otprune.surgery.undo import Snapshot

__all__ = [
    "Snapshot",
    "check_cuts",
    "check_plan",
    "check_slices",
    "compact_",
    "copied",
    "cut_",
    "compared",
    "disagreement",
    "exchange_",
    "gap",
    "gone",
    "masked",
    "merged",
    "put_",
    "renamed",
    "take_out_",
    "tolerance",
    "unlike_config",
]
