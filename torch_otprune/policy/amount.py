"""How much is kept: a fraction of the dense value, or an absolute count."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from torch_otprune.policy.base import plain, problem, short, translated

__all__ = ["Amount", "AmountLike", "Several"]

_SUFFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_NUMBER = r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?)"
_PATTERN = rf"^\s*{_NUMBER}\s*(%|[kKMGBT]?)\s*$"


@dataclass(frozen=True)
class Amount:
    """What is kept, relative or absolute.

    A float up to 1 is a fraction of the dense value, and so is a percentage; a whole number is a
    count. Of channels, parameters and MACs, a bare 1 is read as everything: nobody wants one of
    them. Of layers and activations, which are few, it is one: `Several` reads those.

    Args:
        value: a float in (0, 1] for a fraction, an int of at least 1 for a count.

    Example:
        >>> [Amount.read(x).value for x in (0.5, "50%", 1, "1.2M", 300)]
        [0.5, 0.5, 1.0, 1200000, 300]
        >>> Amount.read("29%").of(100)
        29
    """

    value: float | int
    relative: bool = field(init=False, repr=False)  # so that a single one is not equal to all

    def __post_init__(self) -> None:
        object.__setattr__(self, "relative", isinstance(self.value, float))

    @classmethod
    def read(cls, value: object, *, where: str = "Amount") -> Amount:
        """Read what a user wrote.

        Args:
            value: `0.5`, `"50%"`, `"1.2M"`, `300` or an amount.
            where: what to name in an error.

        Returns:
            the amount.

        Raises:
            PolicyError: if it is no number, not above 0, or above 100 %.
        """
        with translated(where):
            return cls.parse(value)

    @classmethod
    def parse(cls, value: object) -> Amount:
        """Read inside a pydantic validator, which adds the path to any complaint."""
        if isinstance(value, Amount):
            return value
        if isinstance(value, str) and (match := re.match(_PATTERN, value)):
            return _from_text(value, match[1], match[2])
        number = plain(value)
        if isinstance(number, int) and not isinstance(number, bool):
            return _from_int(number, value)
        if isinstance(number, float):
            return _from_float(number, value)
        raise problem(f"{short(value)} is no amount.", fix=_FIX)

    @property
    def everything(self) -> bool:
        """Tell whether nothing has to go."""
        return self.relative and self.value == 1

    def of(self, dense: int) -> int:
        """Evaluate at the dense value, rounding down.

        Args:
            dense: units, parameters or MACs before the cut.

        Returns:
            how many may stay, at most `dense`, in the same unit.
        """
        if isinstance(self.value, int):
            return min(self.value, dense)
        # Decimal reads 0.29 as the user wrote it; in binary 0.29 * 100 rounds down to 28.
        return int(Decimal(repr(self.value)) * dense)

    def __str__(self) -> str:
        """Write a percentage or a grouped count."""
        return f"{100 * self.value:.4g}%" if self.relative else f"{self.value:,}"

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read with `parse`, write a plain number."""
        write = core_schema.plain_serializer_function_ser_schema(lambda amount: amount.value)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=write)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Publish the three spellings."""
        fraction = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
        count = {"type": "integer", "minimum": 2}
        return {"anyOf": [fraction, count, {"type": "string", "pattern": _PATTERN}]}


AmountLike = Amount | float | str

_FIX = "write a fraction such as 0.5, a percentage such as '50%', or a count such as 300 or '1.2M'."


def _several(value: object) -> object:
    """Read a whole number as a count, 1 included, where things are few.

    Args:
        value: what a user wrote.

    Returns:
        an amount; anything but a whole number as it was, for `Amount.parse`.
    """
    text = re.fullmatch(r"\s*(\d+)\s*", value) if isinstance(value, str) else None
    number = int(text[1]) if text else value
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        return value
    return Amount(int(number))


Several = Annotated[Amount, BeforeValidator(_several)]


def _from_text(text: str, number: str, suffix: str) -> Amount:
    amount = Decimal(number)
    if suffix == "%":
        return _from_float(float(amount / 100), text)
    count = amount * _SUFFIX[suffix]
    if suffix == "" and count <= 1:
        return _from_float(float(count), text)
    if count != int(count):
        raise problem(f"{text!r} is no whole number.", fix=_FIX)
    if suffix and count == 1:
        raise problem(f"{text!r} is a count of one, which reads as 100 %.", fix=_FIX)
    return _from_int(int(count), text)


def _from_int(count: int, written: object) -> Amount:
    return Amount(count) if count > 1 else _from_float(float(count), written)


def _from_float(fraction: float, written: object) -> Amount:
    if math.isnan(fraction):
        raise problem("nan is no amount.", fix=_FIX)
    if fraction <= 0:
        raise problem(f"{written!r} keeps nothing.", fix="keep more than 0 %.")
    if fraction > 1:
        raise problem(f"{written!r} keeps more than 100 %.", fix=_FIX)
    return Amount(fraction)
