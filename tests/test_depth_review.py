"""What a review of removing layers found: each of these failed before."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import torch_otprune as otp
from tests.depth_cases import Stack, build, data
from torch_otprune.errors import CalibrationError
from torch_otprune.report import count_macs
from torch_otprune.statistics.taps import Taps
from torch_otprune.structure import Graph, trace
from torch_otprune.structure.flow import flow
from torch_otprune.structure.mute import muted
from torch_otprune.structure.run import run if False else None  # placeholder
