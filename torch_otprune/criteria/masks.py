"""What criteria that learn soft masks while the user trains have in common."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from torch_otprune.policy.registry import Setting

__all__ = ["UNTRAINED", "MaskSetting"]

UNTRAINED = (
    "dtp saw no training step, so the size of the weights decides: attach, train with "
    "attached.step(), then plan"
)

_Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MaskSetting(Setting):
    """How soft masks are trained, and when they become hard."""

    steps: int = Field(
        default=1000, ge=1, description="optimiser steps of the search; masks are hard behind them"
    )
    mode: Literal["proximal", "entropic"] = Field(
        default="proximal",
        description="`proximal`, every step starts from the mask of the last one, and masks "
        "harden by themselves; `entropic`, the softness stays",
    )
    eps: Literal["auto"] | _Positive = Field(
        default="auto",
        description="softness in the unit of the scores, which start around 0.5 with a spread of "
        "0.1; `auto` makes the median unit hard at the end of the search",
    )
    ramp: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of `steps` in which the budget sinks from everything to what is asked",
    )
    lr: Literal["auto"] | _Positive = Field(
        default="auto", description="step size of the scores, which Adam trains; `auto`: 2 / steps"
    )
