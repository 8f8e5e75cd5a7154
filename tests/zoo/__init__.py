"""Architectures that the promise "pruned equals masked, or refused with a reason" is held to."""

from tests.zoo.entry import Entry
from tests.zoo.registry import ENTRIES

__all__ = ["ENTRIES", "Entry"]
