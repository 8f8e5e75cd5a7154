"""YAML in and out: the 1.2 core schema, strict, with line and column in every error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from torch_otprune.errors import PolicyError
from torch_otprune.policy.base import Declaration, Locator, short, translated

__all__ = ["dump_yaml", "load_yaml"]

D = TypeVar("D", bound=Declaration)

# PyYAML follows YAML 1.1, where `no` is false, `1e-3` a string and `010` is eight.
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """A loader that knows the core schema and nothing else."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping whose keys are all different."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in seen:
                text = f"the key {key!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
            seen.add(key)
        # SafeLoader would read `<<` as a merge here; the core schema has none.
        return yaml.constructor.BaseConstructor.construct_mapping(self, node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build one value; a scalar that belies its own tag gets a place in the error."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError):
            text = f"{short(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from None

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """Read an integer in base 10, 8 (0o) or 16 (0x)."""
        text = str(node.value)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    def refuse(self, node: yaml.Node) -> None:
        """Stop at a tag that the core schema lacks."""
        text = f"the tag {node.tag!r} is not allowed"
        raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes exactly the strings that `_Loader` would misread."""

    def ignore_aliases(self, data: Any) -> bool:
        """Spell repeated values out: anchors are no friend of readers."""
        return True


for _cls in (_Loader, _Dumper):
    _cls.yaml_implicit_resolvers = {}
    for _name, _pattern, _first in _RESOLVERS:
        _cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first
        )
for _name, _method in (
    ("null", yaml.SafeLoader.construct_yaml_null),
    ("bool", yaml.SafeLoader.construct_yaml_bool),
    ("int", _Loader.construct_whole),
    ("float", yaml.SafeLoader.construct_yaml_float),
    ("str", yaml.SafeLoader.construct_yaml_str),
    ("seq", yaml.SafeLoader.construct_yaml_seq),
    ("map", yaml.SafeLoader.construct_yaml_map),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _method)
_Loader.add_constructor(None, _Loader.refuse)


def dump_yaml(data: dict[str, Any]) -> str:
    """Write plain data in block style, in the order given.

    Args:
        data: mappings, lists, strings, numbers, booleans and null.

    Returns:
        YAML text.
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)


def load_yaml(cls: type[D], source: str | Path) -> D:
    """Read a declaration from text or a file.

    Args:
        cls: what to read.
        source: text, a `Path`, or a one-line string that ends in .yaml or .yml.

    Returns:
        the declaration.

    Raises:
        PolicyError: naming line and column; `BudgetError` for a line in the budget.
    """
    name, text = _read(source)
    data, root = _parse(name, text)
    if not isinstance(data, dict):
        raise PolicyError(
            f"a {cls.__name__.lower()} is a mapping, this is {short(data)}.",
            where=f"{name}, line 1, column 1",
            fix="start with `rules:`.",
        )
    with translated(cls.__name__, _locator(name, root)):
        built: D = cls.__pydantic_validator__.validate_python(data)
        return built


def _read(source: str | Path) -> tuple[str, str]:
    """Tell a path from text, and return a name for errors beside the text."""
    if isinstance(source, str) and ("\n" in source or not source.endswith((".yaml", ".yml"))):
        return "YAML text", source
    try:
        return str(source), Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PolicyError(
            f"the policy file cannot be read: {reason}.",
            where=str(source),
            fix="give the path of a UTF-8 YAML file, or the YAML text itself.",
        ) from None


def _parse(name: str, text: str) -> tuple[Any, yaml.Node | None]:
    """Build the data, and keep the tree that knows where everything stands."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return (loader.construct_document(root) if root else None), root
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = (mark.line, mark.column) if mark else None
        raise _broken(name, error.problem or error.context or "syntax error", at) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        at = (before.count("\n"), len(before) - before.rfind("\n") - 1)
        raise _broken(name, f"character #x{ord(text[error.position]):04x}", at) from None
    except RecursionError:
        raise _broken(name, "nested too deeply", None) from None


def _broken(name: str, reason: str, at: tuple[int, int] | None) -> PolicyError:
    place = f", line {at[0] + 1}, column {at[1] + 1}" if at else ""
    return PolicyError(
        f"this is no policy YAML: {reason}.",
        where=f"{name}{place}",
        fix="correct the YAML at that place.",
    )


def _locator(name: str, root: yaml.Node | None) -> Locator:
    """Find the line of a path that pydantic reports."""

    def locate(path: tuple[int | str, ...]) -> str:
        node, mark = root, root.start_mark if root else None
        for step in path:
            found = _child(node, step)
            if found:
                node, mark = found[1], found[0].start_mark
        return f"{name}, line {mark.line + 1}, column {mark.column + 1}: " if mark else ""

    return locate


def _child(node: yaml.Node | None, step: int | str) -> tuple[yaml.Node, yaml.Node] | None:
    """Go one step down; return where it is announced (its key) and the value itself."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
        return (node.value[step],) * 2 if step < len(node.value) else None
    if isinstance(node, yaml.MappingNode):
        return next(((key, value) for key, value in node.value if key.value == step), None)
    return None
