"""What a group may keep."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice:
    """What one group may keep, and what that loses.

    Args:
        name: the group.
        curve: predicted loss of keeping the best k units, for k from 0 to all of them, in
            the unit that all groups share; its running minimum counts.
        widths: allowed numbers of kept units, ascending.
    """

    name: str
    curve: Tensor
    widths: tuple[int, ...]
