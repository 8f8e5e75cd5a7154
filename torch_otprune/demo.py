"""The whole path on real data: a residual network on handwritten digits, pruned and checked."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_otprune.errors import OTPruneError, VerificationError
from torch_otprune.pipeline import apply_, prune_
from torch_otprune.policy import Budget, Channels, Policy
from torch_otprune.report import Report
from torch_otprune.store import load, save

__all__ = ["Outcome", "digits_loader", "digits_net", "run"]

Progress = Callable[[str, int, int], None]
_TEST = 597  # of 1 797 images, never trained or calibrated on
_EPOCHS, _BATCH, _RATE = 24, 100, 1e-2
_KEPT = "50%"


def digits_net() -> nn.Module:
    """Build the demo's network, untrained: for `otprune ... torch_otprune.demo:digits_net`.

    Returns:
        a residual network for 8 x 8 grey images in ten classes.
    """
    return _Net()


def digits_loader() -> list[Tensor]:
    """Load the training images without their labels, in batches of 100.

    Returns:
        float tensors of shape 100 x 1 x 8 x 8, in [0, 1].
    """
    return list(_digits().train.split(_BATCH))
