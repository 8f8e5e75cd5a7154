"""Layers that we bring."""

from torch_otprune.nn.convex import FICNN, PICNN, InputConvex, NonNegative
from torch_otprune.nn.depth import ChannelScale, LowRank, Perceptron, Skip, Zero
from torch_otprune.nn.recurrent import ICLRNN, ICLSTM, ICRNN
from torch_otprune.nn.wiring import STREAM, Wiring, check_wiring, streamed, wired

__all__ = [
    "FICNN",
    "ICLRNN",
    "ICLSTM",
    "ICRNN",
    "PICNN",
    "STREAM",
    "ChannelScale",
    "InputConvex",
    "LowRank",
    "Perceptron",
    "NonNegative",
    "Skip",
    "Wiring",
    "Zero",
    "check_wiring",
    "streamed",
    "wired",
]
