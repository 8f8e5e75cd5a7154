"""The base of everything a user declares: frozen, strict, and wrong in three lines."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from torch_otprune.errors import BudgetError, OTPruneError, PolicyError

__all__ = ["Declaration", "nearest", "plain", "problem", "short", "translated"]

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60

# A list whose entries are wrong is also reported as too short: say only the former.
_ECHO = "too_short"

Locator = Callable[[tuple[int | str, ...]], str]


def _publish(schema: dict[str, Any]) -> None:
    """Tell editors the summary only, and ask for `kind`, without which a table is nothing."""
    schema["description"] = schema.get("description", "").split("\n\n")[0].replace("\n", " ")
    if "kind" in schema.get("properties", {}):
        schema["required"] = ["kind", *(k for k in schema.get("required", ()) if k != "kind")]


class Declaration(BaseModel):
    """A frozen model that rejects unknown keys and reports errors as `PolicyError`.

    Only the outermost model translates, so the error names the whole path
    (`Policy.rules[0].keep`) and not just its last step.

    Raises:
        PolicyError: on any invalid field; `BudgetError` if the field is in a budget.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings", json_schema_extra=_publish
    )

    def __init__(self, /, **data: Any) -> None:
        with translated(type(self).__name__):
            super().__init__(**data)

    # Without this mark pydantic would call __init__ for nested models as well, and the
    # inner error would leave before the outer path is known (RootModel does the same).
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validate any input, as pydantic does, with our errors.

        Args:
            obj: a mapping or an instance.
            **options: passed on to pydantic.

        Returns:
            the declaration.

        Raises:
            OTPruneError: `PolicyError` or `BudgetError`, if it is invalid.
        """
        with translated(cls.__name__):
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Validate JSON text, as pydantic does, with our errors.

        Args:
            json_data: the text.
            **options: passed on to pydantic.

        Returns:
            the declaration.

        Raises:
            OTPruneError: `PolicyError` or `BudgetError`, if it is invalid.
        """
        with translated(cls.__name__):
            return super().model_validate_json(json_data, **options)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, data: Any) -> Any:
        """Name the nearest key, which `extra="forbid"` alone cannot do."""
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                raise problem(
                    f"{key!r} is no key of {cls.__name__}.",
                    hint=nearest(str(key), cls.model_fields, "keys"),
                    fix="correct the key or remove it.",
                    key=str(key),
                )
        return data


def problem(text: str, *, fix: str, hint: str = "", key: str = "") -> PydanticCustomError:
    """Build what a validator raises, so that pydantic adds the path.

    Args:
        text: what is wrong, with the value.
        fix: what to do, one imperative sentence.
        hint: what to add behind the path.
        key: a last step of the path that pydantic does not know.

    Returns:
        an error that `translated` reads.
    """
    context = {"problem": text, "fix": fix, "hint": hint, "key": key}
    return PydanticCustomError("otprune", "{problem}", context)


def nearest(word: str, known: Iterable[str], noun: str) -> str:
    """List what could have been meant, then all there is.

    Args:
        word: what was written.
        known: what exists.
        noun: plural name of what exists.

    Returns:
        a phrase for the `where` line.

    Example:
        >>> nearest("kepe", ["keep", "budget"], "keys")
        'closest: keep; known keys: keep, budget'
    """
    names = list(known)
    if not names:
        return f"known {noun}: none"
    lowered = {name.lower(): name for name in names}
    close = [lowered[n] for n in difflib.get_close_matches(word.lower(), lowered, cutoff=0.5)]
    prefix = f"closest: {', '.join(close)}; " if close else ""
    return f"{prefix}known {noun}: {', '.join(names)}"


@contextmanager
def translated(root: str, locate: Locator | None = None) -> Iterator[None]:
    """Turn pydantic's errors into ours; `locate` may put a file and line before a path."""
    try:
        yield
    except ValidationError as error:
        raise _translate(error, root, locate) from None
    except PydanticCustomError as error:
        raise _sentence(error, root) from None


def _sentence(error: PydanticCustomError, where: str) -> PolicyError:
    """Word a `problem` that was raised outside of any model."""
    context = error.context or {}
    hint = f"; {context['hint']}" if context["hint"] else ""
    return PolicyError(context["problem"], where=where + hint, fix=context["fix"])


def _translate(error: ValidationError, root: str, locate: Locator | None) -> OTPruneError:
    """Turn pydantic's first complaint into our three lines."""
    found = error.errors(include_url=False)
    first, *others = _united([e for e in found if e["type"] != _ECHO] or found)
    context = first.get("ctx", {})
    steps = (*first["loc"], context["key"]) if context.get("key") else first["loc"]
    where = (locate(steps) if locate else "") + _spell(root, steps)
    where += f"; {context['hint']}" if context.get("hint") else ""
    where += f" (and {len(others)} more)" if others else ""
    text, fix = _explain(first, _last(root, steps))
    budget = root == "Budget" or first["loc"][:1] == ("budget",)
    return (BudgetError if budget else PolicyError)(text, where=where, fix=fix)


def _united(found: list[ErrorDetails]) -> list[ErrorDetails]:
    """Join what both sides of `Literal["auto"] | float` say of one value."""
    *path, side = found[0]["loc"] or ("",)
    if not str(side).startswith("literal["):
        return found
    alike = [e for e in found if e["loc"][:-1] == tuple(path)]
    said = [re.sub(", (unable|got) .*", "", e["msg"]).removeprefix(_SHOULD) for e in alike]
    joined = _SHOULD + " or ".join(said)
    first: ErrorDetails = {**found[0], "loc": tuple(path), "msg": joined}
    return [first, *(e for e in found if e not in alike)]


def _spell(root: str, steps: Iterable[int | str]) -> str:
    return root + "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps)


def _last(root: str, steps: tuple[int | str, ...]) -> str:
    """Name what is wrong by its own key: `at[0]`, not `0`."""
    keys = [i for i, step in enumerate(steps) if isinstance(step, str)]
    first = keys[-1] if keys else len(steps)
    return _spell(str(steps[first]), steps[first + 1 :]) if keys else _spell(root, steps)


def _explain(error: ErrorDetails, name: str) -> tuple[str, str]:
    """Word one complaint as problem and fix."""
    context = error.get("ctx", {})
    if error["type"] == "otprune":
        return context["problem"], context["fix"]
    if error["type"] == "missing":
        return f"{name} is missing.", f"give {name}."
    if error["type"] == "too_short":
        return f"{name} is empty.", "give at least one."
    if error["type"] == "json_invalid":
        return f"this is no JSON: {context['error']}.", "correct the text at that place."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    value = short(error["input"])
    if error["type"] in _PLAIN:
        wanted = _PLAIN[error["type"]]
        return f"{value} is no valid {name}: it should be {wanted}.", f"make it {wanted}."
    if message.startswith(_SHOULD):
        wanted = re.sub(", (unable|got) .*", "", message.removeprefix(_SHOULD))
        close = difflib.get_close_matches(str(error["input"]), wanted.split("'")[1::2])
        fix = f"write {close[0]!r}." if close else f"make it {wanted}."
        return f"{value} is no valid {name}: it should be {wanted}.", fix
    return f"{value} is no valid {name}: {message.rstrip('.')}.", f"correct {name}."


_SHOULD = "Input should be "
# What pydantic calls by the names of Python's types.
_PLAIN = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table of keys and values",
    "model_type": "a table of keys and values",
    "model_attributes_type": "a table of keys and values",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def plain(value: object) -> object:
    """Read another library's number, such as numpy's, as one of Python's own.

    Args:
        value: anything.

    Returns:
        an int or a float that is written alike, so that a short float stays what was meant;
        anything that is no number as it was.

    Example:
        >>> import numpy as np
        >>> plain(np.int64(2)), plain(np.float32(0.29)), plain("2")
        (2, 0.29, '2')
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    with suppress(ValueError):
        return float(str(value))  # in binary, 0.29 of single precision is another number
    return float(value)


def short(value: object) -> str:
    """Show a value in one line; bounded, since YAML aliases can nest without end.

    Args:
        value: anything.

    Returns:
        at most 80 characters.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
