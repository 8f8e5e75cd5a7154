"""What a module's class mentions: read from its methods, once per class."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Hashable, Iterator
from typing import Any, cast

from torch import nn

__all__ = ["mentions", "only_scales"]

_SCALES = (ast.Div, ast.Pow)


def only_scales(kind: type, key: str) -> bool:
    """Tell whether a class, once built, only divides by a number or takes roots of it.

    Such a number scales what the model computes: it is that of the dense model for ever. Of a
    configuration one such use is enough: no module takes a size from it by a method.

    Args:
        kind: class of a module or a configuration.
        key: the attribute.

    Returns:
        whether it must stay; no where the source cannot be read.
    """
    return _decided(cast("Hashable", kind), key)


@functools.cache
def _decided(kind: Any, key: str) -> bool:
    bases = [b for b in kind.__mro__ if b is not nn.Module and key in _mentioned(b)]
    uses = [use for base in bases for use in _uses(base, key)]
    return any(uses) if not issubclass(kind, nn.Module) else bool(uses) and all(uses)


def _uses(kind: type, key: str) -> Iterator[bool]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return  # no source, as in a console: nothing is known
    built = [
        f
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for f in node.body
        if isinstance(f, ast.FunctionDef) and not f.name.startswith(("__init", "_init"))
    ]
    nodes = [node for f in built for node in ast.walk(f)]
    roots = [n for n in nodes if isinstance(n, ast.Call) and "sqrt" in ast.dump(n.func)]
    rooted = {id(inner) for root in roots for inner in ast.walk(root)}
    for node in nodes:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute) and child.attr == key:
                scales = isinstance(node, ast.BinOp) and isinstance(node.op, _SCALES)
                yield scales or id(child) in rooted


def mentions(module: nn.Module) -> set[str]:
    """List the names that the methods of a module's class mention, but for its construction.

    Args:
        module: any module.

    Returns:
        names of attributes and functions.
    """
    bases = type(module).__mro__
    return set().union(*map(_mentioned, bases[: bases.index(nn.Module)]))


def _mentioned(kind: type) -> set[str]:
    methods = [
        inspect.unwrap(value.fget) if isinstance(value, property) and value.fget else value
        for value in vars(kind).values()
    ]
    codes = [getattr(inspect.unwrap(m), "__code__", None) for m in methods if callable(m)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        if code is not None and code.co_name != "__init__":
            names |= set(code.co_names)
            codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
    return names
