"""What a model is as a function of its input, and has to stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from torch_otprune.policy.base import Declaration, problem, short

__all__ = ["Lipschitz", "Preserve", "PreserveLike"]


class Lipschitz(Declaration):
    """A bound on the change of all outputs per change of the input, in Euclidean norm.

    Example:
        >>> Lipschitz(lipschitz=2.0)
        Lipschitz(lipschitz=2.0)
    """

    lipschitz: float = Field(gt=0, allow_inf_nan=False, description="most that may be")


_FIX = "write 'convex', 'monotone', or a bound such as {'lipschitz': 2.0}."


def _promises(value: object) -> object:
    """Read one as a list of one; say plainly what cannot be preserved."""
    one = isinstance(value, (str, bytes, Mapping, Lipschitz))
    try:
        entries = [value] if one else list(value)  # type: ignore[call-overload]
    except TypeError:  # of one thing there is no list
        entries = [value]
    for entry in entries:
        named = isinstance(entry, str) and entry in ("convex", "monotone")
        bound = isinstance(entry, Mapping) and [*entry] == ["lipschitz"]
        if not (named or bound or isinstance(entry, Lipschitz)):
            raise problem(f"{short(entry)} is nothing that can be preserved.", fix=_FIX)
        if isinstance(entry, Mapping):
            _bounded(entry["lipschitz"])
    return tuple(entries)


def _bounded(value: object) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf:  # type: ignore[operator]
        raise problem(
            f"{short(value)} is no lipschitz bound.", fix="give a positive, finite number."
        )


PreserveLike = str | Mapping[str, float] | Lipschitz
_Promise = Literal["convex", "monotone"] | Lipschitz
Preserve = Annotated[
    tuple[_Promise, ...],
    BeforeValidator(_promises, json_schema_input_type=_Promise | tuple[_Promise, ...]),
]
