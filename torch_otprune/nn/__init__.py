"""Layers that we bring."""

from torch_otprune.nn.depth import ChannelScale, LowRank, Skip, Zero
from torch_otprune.nn.wiring import STREAM, Wiring, check_wiring, streamed, wired

__all__ = [
    "STREAM",
    "ChannelScale",
    "LowRank",
    "Skip",
    "Wiring",
    "Zero",
    "check_wiring",
    "streamed",
    "wired",
]
