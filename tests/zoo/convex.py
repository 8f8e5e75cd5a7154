"""Input-convex nets: every hidden width of theirs can go."""

from __future__ import annotations

from torch import nn

from tests.zoo.net import Shelf
from tests.zoo.recurrent import normal
from torch_otprune.nn import FICNN, ICLRNN, ICLSTM, ICRNN, PICNN

ENTRIES = Shelf("convex")


@ENTRIES(5)
def ficnn() -> nn.Module:
    return FICNN(5, (9, 8, 7), 2)


@ENTRIES(5)
def ficnn_softplus() -> nn.Module:
    return FICNN(5, (9,), 2, activation="softplus")


@ENTRIES(example=lambda: (normal(2, 5), normal(2, 4, seed=2)))
def picnn() -> nn.Module:
    return PICNN(5, 4, (9, 8))


@ENTRIES(4, 3)
def icrnn() -> nn.Module:
    return ICRNN(3, 8, 2)


@ENTRIES(4, 3)
def icrnn_monotone() -> nn.Module:
    return ICRNN(3, 8, 2, doubled=False)


@ENTRIES(4, 3)
def iclrnn() -> nn.Module:
    return ICLRNN(3, 8, 2)


@ENTRIES(4, 3)
def iclstm() -> nn.Module:
    return ICLSTM(3, 8, 2)


@ENTRIES(4, 3)
def iclstm_log_convex() -> nn.Module:
    return ICLSTM(3, 8, 2, gates="exp")
