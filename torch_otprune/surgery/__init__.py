"""A plan carried out on a model, and the way back."""

from torch_otprune.surgery.baked import baked
from torch_otprune.surgery.carried import inscribe_
from torch_otprune.surgery.check import check_plan, check_slices, tolerance
from torch_otprune.surgery.compact import compact_, renamed, take_out_
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import check_cuts, cut_, merged, put_
from torch_otprune.surgery.exchange import exchange_, gone
from torch_otprune.surgery.lineage import Lineage
from torch_otprune.surgery.oracle import compared, disagreement, gap, masked, stumbled
from torch_otprune.surgery.reload import unlike_config
from torch_otprune.surgery.thin import check_thinned, check_zeros, thinned
from torch_otprune.surgery.trial import parts, told
from torch_otprune.surgery.undo import Snapshot
from torch_otprune.surgery.uniform import unsaid

__all__ = [
    "baked",
    "Lineage",
    "Snapshot",
    "check_cuts",
    "check_plan",
    "check_slices",
    "check_thinned",
    "check_zeros",
    "compact_",
    "copied",
    "cut_",
    "compared",
    "disagreement",
    "exchange_",
    "gap",
    "gone",
    "inscribe_",
    "masked",
    "merged",
    "parts",
    "put_",
    "renamed",
    "stumbled",
    "take_out_",
    "told",
    "thinned",
    "tolerance",
    "unlike_config",
    "unsaid",
]
