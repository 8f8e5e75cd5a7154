"""One table per extension point: criteria, repairs and kinds of rule."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from torch_otprune.errors import PolicyError
from torch_otprune.policy.base import Declaration, nearest, problem, short, translated

__all__ = [
    "CRITERIA",
    "LAYER_CRITERIA",
    "MAPS",
    "PENALTIES",
    "REPAIRS",
    "REPLACEMENTS",
    "RULES",
    "WEIGHT_CRITERIA",
    "Entry",
    "Setting",
    "Table",
]


class Setting(Declaration):
    """A named behaviour with its settings: the base of every criterion, repair and rule.

    A subclass narrows `kind` to a literal with a default and registers itself.
    """

    kind: str


S = TypeVar("S", bound=Setting)
T = TypeVar("T", bound=Setting)


class Table(Generic[S]):
    """The kinds of one extension point, by name, in alphabetical order.

    Args:
        noun: what an entry is called in errors.
        home: the package that registers our own entries, imported when first asked for one.

    Example:
        >>> COLOURS: Table[Setting] = Table("colour")
        >>> @COLOURS.register
        ... class Red(Setting):
        ...     kind: str = "red"
        ...     shade: float = 0.5
        >>> COLOURS.resolve("red")
        Red(kind='red', shade=0.5)
        >>> COLOURS.resolve({"kind": "red", "shade": 0.1})
        Red(kind='red', shade=0.1)
        >>> "blue" in COLOURS, list(COLOURS)
        (False, ['red'])
    """

    def __init__(self, noun: str, home: str | None = None) -> None:
        self.noun, self.home = noun, home
        self._registered: dict[str, type[Setting]] = {}

    @property
    def _classes(self) -> dict[str, type[Setting]]:
        if self.home is not None and self.home not in sys.modules:
            import_module(self.home)
        return self._registered

    @property
    def plural(self) -> str:
        """Name several entries."""
        for one, many in (("criterion", "criteria"), ("penalty", "penalties")):
            if self.noun.endswith(one):
                return self.noun.removesuffix(one) + many
        return f"{self.noun}s"

    def register(self, cls: type[T]) -> type[T]:
        """Add a class under the default of its `kind`.

        Args:
            cls: the class; running its definition again, as notebooks do, replaces it.

        Returns:
            the same class, so that this is a decorator.

        Raises:
            PolicyError: if it has no default kind, or another class has taken it.
        """
        kind, where = cls.model_fields["kind"].default, f"{cls.__module__}.{cls.__qualname__}"
        if not (isinstance(kind, str) and kind.isidentifier()):
            raise PolicyError(
                f"{cls.__name__} names no kind.",
                where=where,
                fix="give its field `kind` a literal type and a snake_case default.",
            )
        taken = self._registered.get(kind, cls)
        if (other := f"{taken.__module__}.{taken.__qualname__}") != where:
            raise PolicyError(
                f"the {self.noun} {kind!r} is already registered.",
                where=f"{where} and {other}",
                fix="rename one of the two.",
            )
        self._registered[kind] = cls
        return cls

    def remove(self, kind: str) -> None:
        """Take a kind out again, for instance at the end of a test."""
        with translated(self.noun):
            self._find(kind)
        del self._registered[kind]

    def resolve(self, value: str | Mapping[str, Any] | Setting) -> S:
        """Turn a bare name, a table of settings or an instance into an instance.

        Args:
            value: what the user wrote.

        Returns:
            the setting; an instance comes back as it is.

        Raises:
            PolicyError: if the kind is unknown or a setting is invalid.
        """
        with translated(self.noun):
            return self.parse(value)

    def parse(self, value: object) -> S:
        """Resolve inside a pydantic validator, which adds the path to any complaint."""
        if isinstance(value, Setting):
            return self._own(value)
        if isinstance(value, str):
            return self._build(value, {"kind": value})
        if not isinstance(value, Mapping):
            raise problem(
                f"{short(value)} is no {self.noun}.",
                fix="write a name, a table with the key `kind`, or an instance.",
            )
        if "kind" not in value:
            raise problem(
                f"this {self.noun} does not say its kind.",
                hint=f"known {self.plural}: {', '.join(self)}",
                fix="add the key `kind`.",
            )
        return self._build(value["kind"], dict(value))

    def _build(self, kind: object, settings: dict[str, Any]) -> S:
        built: S = self._find(kind).__pydantic_validator__.validate_python(settings)
        return built

    def _own(self, value: Setting) -> S:
        """Accept an instance only of the class that its kind would bring back from YAML."""
        if type(value) is not self._find(value.kind):
            raise problem(
                f"{type(value).__name__} is not the registered {self.noun} {value.kind!r}.",
                fix=f"register the class under a kind of its own in the table of {self.plural}.",
            )
        own: S = value  # type: ignore[assignment]
        return own

    def _find(self, kind: object) -> type[Setting]:
        if not (isinstance(kind, str) and kind in self._classes):
            raise problem(
                f"{short(kind)} is no known {self.noun}.",
                hint=nearest(str(kind), self, self.plural),
                fix=f"use a known {self.noun}, or import the module that registers this one.",
            )
        return self._classes[kind]

    def __getitem__(self, kind: str) -> type[S]:
        with translated(self.noun):
            found: type[S] = self._find(kind)  # type: ignore[assignment]
            return found

    def __contains__(self, kind: object) -> bool:
        return kind in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)


class Entry:
    """An annotation: the field holds an entry of this table.

    Reads a bare name, a table or an instance, and writes the full table whatever the
    subclass. Kinds registered later are read and published without further ado.

    Args:
        table: where kinds are looked up.
    """

    def __init__(self, table: Table[Any]) -> None:
        self.table = table

    def __get_pydantic_core_schema__(
        self, source: type[Setting], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Resolve first, then let pydantic check the class."""
        return core_schema.no_info_before_validator_function(
            self.table.parse,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Publish a union over what is registered now, discriminated by `kind`."""
        tables = [handler(self.table[kind].__pydantic_core_schema__) for kind in self.table]
        names: JsonSchemaValue = {"enum": list(self.table)}
        return {"oneOf": [names, *tables], "discriminator": {"propertyName": "kind"}}


def _dump(value: Setting, info: core_schema.SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)


CRITERIA: Table[Setting] = Table("criterion", home="torch_otprune.criteria")
LAYER_CRITERIA: Table[Setting] = Table("layer criterion", home="torch_otprune.criteria.layers")
WEIGHT_CRITERIA: Table[Setting] = Table("weight criterion", home="torch_otprune.criteria.weights")
REPAIRS: Table[Setting] = Table("repair", home="torch_otprune.repair")
REPLACEMENTS: Table[Setting] = Table("replacement", home="torch_otprune.repair.replace")
MAPS: Table[Setting] = Table("map", home="torch_otprune.maps")
PENALTIES: Table[Setting] = Table("penalty", home="torch_otprune.training")
RULES: Table[Setting] = Table("rule")
