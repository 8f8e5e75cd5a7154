"""Layers that we bring."""

from torch_otprune.nn.depth import ChannelScale, LowRank, Skip, Zero
from torch_otprune.nn.wiring import STREAM, Wiring, check_wiring, stream_of, wired, wiring_of

__all__ = [
    "STREAM",
    "ChannelScale",
    "LowRank",
    "Skip",
    "Wiring",
    "Zero",
    "check_wiring",
    "stream_of",
    "wired",
    "wiring_of",
]
