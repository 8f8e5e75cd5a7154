"""Nothing stands in for the block."""

from __future__ import annotations

from typing import Literal

from torch_otprune.plan.replacement import Replacement, register

__all__ = ["Identity"]


@register
class Identity(Replacement):
    """Hand the block's input on as it is."""

    kind: Literal["identity"] = "identity"
