"""What a fold promises: where the output stays, and what it costs before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from torch_otprune.plan.model import Cost

__all__ = ["Certificate", "Folded", "Kind"]

Kind = Literal["exact", "interior", "approximate"]


class Certificate(BaseModel):
    """How far a fold may move the output, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    kind: Kind = Field(
        description="`exact`: up to rounding; `interior`: but for a border; `approximate`: nowhere"
    )
    reason: str = Field(description="one sentence")
    border: tuple[int, ...] = Field(
        default=(), description="output positions along each edge that may differ, per axis"
    )
    size: tuple[int, ...] | None = Field(
        default=None, description="the one input size it holds for; None for any"
    )
    error: float | None = Field(
        default=None, ge=0, description="measured change, as a share of the largest output"
    )
    params: Cost = Field(description="elements of parameters")
    macs: Cost | None = Field(
        default=None, description="multiply-accumulates per sample; None where no size was given"
    )


@dataclass(frozen=True)
class Folded:
    """New layers that stand for old ones.

    Args:
        modules: in order of execution.
        certificate: what they promise.
    """

    modules: tuple[nn.Module, ...]
    certificate: Certificate

    @property
    def module(self) -> nn.Module:
        """Take them as one module."""
        return self.modules[0] if len(self.modules) == 1 else nn.Sequential(*self.modules)
