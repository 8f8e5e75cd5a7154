"""A policy on a module: hooks that watch, and the handle that turns what they saw into a plan."""

from torch_otprune.attach.front import attach, check_unattached, observe
from torch_otprune.attach.handle import EXAMPLE, Attached
from torch_otprune.attach.needs import looks_at_channels
from torch_otprune.attach.rounds import carries_out

__all__ = [
    "EXAMPLE",
    "Attached",
    "attach",
    "carries_out",
    "check_unattached",
    "looks_at_channels",
    "observe",
]
