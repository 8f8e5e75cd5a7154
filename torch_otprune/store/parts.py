"""What every module is and says about itself, written down, compared, and put back."""

from __future__ import annotations

import ast
import dataclasses
import enum
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

__all__ = [
    "Difference",
    "Parts",
    "describe",
    "difference",
    "differences",
    "gathered",
    "put_back_",
    "read",
    "without",
    "write",
]

_EVERY = frozenset(vars(nn.Module()))
_SWITCHES = frozenset({"gradient_checkpointing"})  # set by who trains, not by who builds
_NOTED = frozenset(  # what Transformers writes on a configuration when a model is saved
    "_name_or_path architectures dtype quantization_config transformers_version".split()
)
_LONG = 10_000  # characters; what is longer is hashed
_DEEP = 4  # levels of lists and tables
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_PATH = re.compile(r"^(/|~|\\\\|[A-Za-z]:[\\/])")
_INFINITE = "1e999"  # how a literal says it


class Parts(BaseModel):
    """The classes and plain attributes of a model's modules; equal modules are written once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: dict[str, int] = Field(description="path to its place in `kinds`")
    kinds: tuple[tuple[str, dict[str, str]], ...] = Field(
        description="class name, and attribute to its value as Python writes it"
    )

    def of(self, path: str) -> tuple[str, dict[str, str]]:
        """Look one module up."""
        return self.kinds[self.modules[path]]


class Difference(NamedTuple):
    """Where two models differ first.

    Args:
        path: of the module.
        attribute: None where the class differs, or the module is missing.
        here: class or value; None where the module is missing.
        there: the same of the other model.
    """

    path: str
    attribute: str | None
    here: str | None
    there: str | None

    @property
    def curable(self) -> bool:
        """Whether `put_back_` can write what the other model says: no class, no function."""
        if self.attribute is None or "." in self.attribute or self.there is None:
            return False
        try:
            read(self.there)
        except ValueError:
            return False
        return True

    def told(self, here: str, there: str) -> str:
        """Say it in a sentence.

        Args:
            here: what the one model is called.
            there: the other.

        Returns:
            the sentence.
        """
        name = f"'{self.path}'" if self.path else "the model itself"
        if self.here is None:
            return f"{here} has no module {name}, {there} has: a {self.there}."
        if self.there is None:
            return f"{here} has a module {name}, a {self.here}; {there} has not."
        if self.attribute is None:
            return f"{name} is a {self.here} in {here}, a {self.there} in {there}."
        return f"{name} has {self.attribute} {self.here} in {here}, {self.there} in {there}."


def describe(model: nn.Module) -> Parts:
    """Write down every module's class and plain attributes.

    Numbers, strings, types, functions by their names, and lists, tuples, sets and tables of
    them, also those of a dataclass that a module refers to. Not: private attributes, tensors,
    training flags, other objects, and what holds an address or a path of this machine.

    Args:
        model: any module; left as it was.

    Returns:
        the description.
    """
    named = model.named_modules(remove_duplicate=False)
    return gathered((path, module, vars(module)) for path, module in named)


def gathered(modules: Iterable[tuple[str, nn.Module, Mapping[str, Any]]]) -> Parts:
    """Write modules down as `describe` does.

    Args:
        modules: path, module, and what it says about itself.

    Returns:
        the description.
    """
    told = ((path, (type(m).__name__, dict(_attributes(said)))) for path, m, said in modules)
    return _once(told)


def _once(told: Iterable[tuple[str, tuple[str, dict[str, str]]]]) -> Parts:
    """Keep one copy of what several modules say."""
    modules: dict[str, int] = {}
    places: dict[str, int] = {}
    kinds: list[tuple[str, dict[str, str]]] = []
    for path, kind in told:
        modules[path] = places.setdefault(repr(kind), len(kinds))
        kinds += [kind] if modules[path] == len(kinds) else []
    return Parts(modules=modules, kinds=tuple(kinds))


def _attributes(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in sorted(said.items(), key=lambda item: str(item[0])):
        if key in _EVERY or key in _SWITCHES or key.startswith("_"):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for inner, field in sorted(vars(value).items()):
                if inner not in _NOTED and (text := write(field)) is not None:
                    yield f"{key}.{inner}", text
        elif (text := write(value)) is not None:
            yield key, text


def write(value: object) -> str | None:
    """Write a plain value as Python does.

    Args:
        value: anything.

    Returns:
        its text, a hash where that is long, and None where the value is not plain.
    """
    text = _text(value, _DEEP)
    if text is None or len(text) <= _LONG:
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _text(value: object, deep: int) -> str | None:
    if isinstance(value, enum.Enum):
        return f"<{type(value).__name__}.{value.name}>"
    if value is None or isinstance(value, (bool, torch.dtype)):
        return str(value)
    if isinstance(value, int):
        return repr(int(value))
    if isinstance(value, float):
        return repr(float(value)).replace("inf", _INFINITE)
    if isinstance(value, str):
        return None if _ADDRESS.search(value) or _PATH.search(value) else repr(str(value))
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return f"<{value.__name__}>"
    return _listed(value, deep) if deep else None


def _listed(value: object, deep: int) -> str | None:
    if isinstance(value, Mapping):
        pairs = [(_text(k, 1), _text(v, deep - 1)) for k, v in value.items()]
        known = [f"{k}: {v}" for k, v in pairs if k is not None and v is not None]
        return f"{{{', '.join(known)}}}" if len(known) == len(pairs) else None
    if not isinstance(value, (list, tuple, set, frozenset)):
        return None
    entries = [_text(entry, deep - 1) for entry in value]
    known = [entry for entry in entries if entry is not None]
    if len(known) < len(entries):
        return None
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(known))}}}" if known else "set()"
    inner = ", ".join(known)
    if isinstance(value, list):
        return f"[{inner}]"
    return f"({inner},)" if len(known) == 1 else f"({inner})"


def read(text: str) -> Any:
    """Read a value that `write` wrote.

    Args:
        text: what it returned.

    Returns:
        the value; of numbers, strings, lists, tuples, sets and tables, an equal one.

    Raises:
        ValueError: if the text names something that is no literal, such as a function.
    """
    try:
        return ast.literal_eval(text)
    except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(text) from error


def difference(here: Parts, there: Parts, *, tables: bool = True) -> Difference | None:
    """Find the first module in which two models differ, in the order of the second.

    An attribute that only one of the two has is passed over: libraries add some over time.

    Args:
        here: one description.
        there: the other.
        tables: whether modules that only one of the two has count.

    Returns:
        the difference; None where there is none.
    """
    return next(differences(here, there, tables=tables), None)


def differences(here: Parts, there: Parts, *, tables: bool = True) -> Iterator[Difference]:
    """Find the modules and attributes in which two models differ, as `difference` does.

    Args:
        here: one description.
        there: the other.
        tables: whether modules that only one of the two has count.

    Yields:
        every difference.
    """
    for path in dict.fromkeys([*there.modules, *here.modules]):
        if path not in here.modules or path not in there.modules:
            if tables:
                missing = path not in here.modules
                kind = (there if missing else here).of(path)[0]
                yield Difference(path, None, *((None, kind) if missing else (kind, None)))
            continue
        (mine, own), (other, theirs) = here.of(path), there.of(path)
        if mine != other:
            yield Difference(path, None, mine, other)
            continue
        for key in sorted(k for k in own.keys() & theirs.keys() if own[k] != theirs[k]):
            yield Difference(path, key, own[key], theirs[key])


def without(parts: Parts, other: Parts) -> Parts:
    """Leave out every attribute that another description of an equal model tells otherwise.

    What two builds of one factory do not agree on is random, a time or a count: it says nothing.

    Args:
        parts: one description.
        other: of the same model, or of another build of it.

    Returns:
        what both agree on.
    """

    def agreed(path: str) -> tuple[str, dict[str, str]]:
        name, own = parts.of(path)
        theirs = other.of(path)[1] if path in other.modules else own
        return name, {k: v for k, v in own.items() if theirs.get(k, v) == v}

    return _once((path, agreed(path)) for path in parts.modules)


def put_back_(model: nn.Module, parts: Parts) -> None:
    """Let every module say again what it said; of what is no literal, nothing is written.

    Args:
        model: written in place.
        parts: what its modules said.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        if path not in parts.modules:
            continue
        for key, text in parts.of(path)[1].items():
            name, _, field = key.partition(".")
            if field or name not in vars(module) or write(vars(module)[name]) == text:
                continue
            try:
                setattr(module, name, read(text))
            except ValueError:  # a function, a type, a hash: what the factory builds stays
                continue
