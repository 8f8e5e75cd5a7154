r"""The grammar of targets: which modules a pattern selects, and which pattern wins.

| written            | selects                                                            |
|--------------------|--------------------------------------------------------------------|
| `layer1.0.conv1`   | this module                                                        |
| `layer*`, `**.fc`  | a glob: `*` and `?` stop at dots, `**` does not, `[ab]`, `[!ab]`    |
| `re:layer[12]\..*`  | a regular expression that fits the whole path                      |
| `Conv2d`           | modules of this class or a subclass, when no path is called so     |
| `auto`             | everything                                                         |

A pattern that selects a container selects everything below it.

Between two rules the more specific pattern wins: a path or glob before a regular
expression, before a class, before `auto`; among paths and globs the one with more
literal characters, then the path. So `layer1.*.conv1` beats `layer1`, which beats `layer*`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from torch import nn

from torch_otprune.errors import TargetError
from torch_otprune.policy.base import problem

__all__ = ["Classes", "check_pattern", "match", "module_classes", "owner", "selects", "specificity"]

Classes = Mapping[str, tuple[str, ...]]
Specificity = tuple[int, int, int]

_AUTO, _CLASS, _REGEX, _PATH = range(4)


class _Aimed(Protocol):
    """What a rule needs to be aimed."""

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def ignore(self) -> tuple[str, ...]: ...


def module_classes(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """List every module with the names of its classes, most derived first.

    Args:
        model: any module; itself goes by the empty path.

    Returns:
        class names by path, without `Module` and `object`.

    Example:
        >>> module_classes(nn.Sequential(nn.ReLU()))
        {'': ('Sequential',), '0': ('ReLU',)}
    """
    return {path: _class_names(type(module)) for path, module in model.named_modules()}


def _class_names(cls: type) -> tuple[str, ...]:
    return tuple(base.__name__ for base in cls.__mro__ if base not in (nn.Module, object))


def check_pattern(pattern: object) -> object:
    """Refuse a pattern that could never match, inside a pydantic validator."""
    if not isinstance(pattern, str):
        return pattern
    if not pattern.strip() or pattern == "re:":
        raise problem(f"{pattern!r} is an empty pattern.", fix="write a path, or 'auto' for all.")
    try:
        _compile(pattern)
    except re.error as error:
        raise problem(
            f"{pattern!r} is no valid pattern: {error}.",
            fix="correct the expression; a literal dot is written '\\.'.",
        ) from None
    return pattern


def specificity(pattern: str, path: str, classes: Classes) -> Specificity | None:
    """Say how closely a pattern fits a module, directly or through a container above it.

    Args:
        pattern: one target.
        path: the module.
        classes: every module of the model, as `module_classes` lists them.

    Returns:
        a tuple that compares larger where the fit is closer; None without a fit.

    Example:
        >>> names = {"": ("Net",), "layer1": ("Block",), "layer1.conv": ("Conv2d",)}
        >>> [specificity(p, "layer1.conv", names) for p in ("layer1", "*.conv", "Block", "fc")]
        [(3, 6, 1), (3, 5, 0), (1, 6, 0), None]
    """
    if pattern == "auto":
        return (_AUTO, 0, 0)
    if pattern in classes or not pattern.isidentifier():
        literal = pattern in classes
        if not any(_fits(pattern, above, literal) for above in _lineage(path) if above):
            return None
        if pattern.startswith("re:") and not literal:
            return (_REGEX, 0, 0)
        return (_PATH, len(pattern) if literal else _literals(pattern), int(literal))
    for above in _lineage(path):
        if pattern in (chain := classes.get(above, ())):
            return (_CLASS, len(above), -chain.index(pattern))
    return None


def _fits(pattern: str, path: str, literal: bool) -> bool:
    return pattern == path if literal else _compile(pattern).fullmatch(path) is not None


def _lineage(path: str) -> list[str]:
    """List the path and every container above it, the root included."""
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def selects(patterns: Iterable[str], path: str, classes: Classes) -> bool:
    """Tell whether any pattern fits the module or a container above it.

    Args:
        patterns: targets.
        path: the module.
        classes: every module of the model, as `module_classes` lists them.

    Returns:
        whether one does.
    """
    return any(specificity(pattern, path, classes) is not None for pattern in patterns)


def match(
    targets: Sequence[str],
    ignore: Sequence[str],
    classes: Classes,
    *,
    where: str = "Policy",
) -> list[str]:
    """List the modules that the targets select and `ignore` does not.

    Args:
        targets: patterns.
        ignore: patterns.
        classes: every module of the model, as `module_classes` lists them.
        where: whose targets these are, for errors.

    Returns:
        paths, in the order of `classes`; containers and what is below them alike.

    Raises:
        TargetError: if a pattern selects no module, or everything selected is ignored.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> match(["Linear", "1"], ["1.1"], module_classes(model))
        ['0', '1', '1.0']
    """
    _require_matches(targets, classes, f"{where}.targets")
    _require_matches(ignore, classes, f"{where}.ignore")
    chosen = [path for path in classes if selects(targets, path, classes)]
    kept = [path for path in chosen if not selects(ignore, path, classes)]
    if not kept:
        raise TargetError(
            f"all {len(chosen)} modules that {_quoted(targets)} selects are ignored.",
            where=f"{where}.ignore = {_quoted(ignore)}",
            fix="ignore less, or target more.",
        )
    return kept


def owner(
    rules: Sequence[_Aimed], path: str, classes: Classes, *, ignore: Sequence[str] = ()
) -> int | None:
    """Find the one rule that a module obeys: the one with the most specific target.

    Args:
        rules: rules of one kind; rules of different kinds do not compete.
        path: the module.
        classes: every module of the model, as `module_classes` lists them.
        ignore: patterns that no rule may reach.

    Returns:
        index of the rule, or None if no rule reaches the module.

    Raises:
        TargetError: if two rules fit equally closely.
    """
    if selects(ignore, path, classes):
        return None
    best: tuple[Specificity, int, str] | None = None
    rival: tuple[int, str] | None = None
    for index, rule in enumerate(rules):
        fit = _closest(rule, path, classes)
        if fit is None or (best and fit[0] < best[0]):
            continue
        rival = (best[1], best[2]) if best and fit[0] == best[0] else None
        best = (fit[0], index, fit[1])
    if best and rival:
        raise TargetError(
            f"two rules fit {path!r} equally closely: {rival[1]!r} and {best[2]!r}.",
            where=f"Policy.rules[{rival[0]}].targets and Policy.rules[{best[1]}].targets",
            fix=f"name {path!r} in the targets of one, or in the ignore of the other.",
        )
    return best[1] if best else None


def _closest(rule: _Aimed, path: str, classes: Classes) -> tuple[Specificity, str] | None:
    if selects(rule.ignore, path, classes):
        return None
    fits = [(specificity(pattern, path, classes), pattern) for pattern in rule.targets]
    return max(((fit, pattern) for fit, pattern in fits if fit is not None), default=None)


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        return re.compile(pattern[3:], re.DOTALL)
    return re.compile("".join(_translate(token) for token in _tokens(pattern)), re.DOTALL)


def _tokens(glob: str) -> list[str]:
    """Split a glob; `**.` at the start of a segment stands for any number of segments."""
    return re.findall(r"(?:(?<=^)|(?<=\.))\*\*\.|\*+|\?|\[!?\]?[^\]]*\]|.", glob, re.DOTALL)


def _translate(token: str) -> str:
    if token == "**.":
        return r"(?:.+\.)?"
    if token.startswith("*"):
        return r".*" if len(token) > 1 else r"[^.]*"
    if token == "?":
        return r"[^.]"
    if len(token) > 2:
        inside = re.sub(r"([\\\[^&~|])", r"\\\1", token[1:-1])  # these mean more to `re`
        return rf"(?!\.)[{'^' + inside[1:] if inside[0] == '!' else inside}]"
    return re.escape(token)


def _literals(glob: str) -> int:
    return sum(len(token) == 1 and token not in "*?" for token in _tokens(glob))


def _require_matches(patterns: Sequence[str], classes: Classes, where: str) -> None:
    """Refuse a pattern that selects no module."""
    for pattern in patterns:
        if not any(selects([pattern], path, classes) for path in classes):
            raise _unmatched(pattern, classes, where)


def _unmatched(pattern: str, classes: Classes, where: str) -> TargetError:
    names = [path for path in classes if path]
    words = [*names, *dict.fromkeys(name for chain in classes.values() for name in chain)]
    stem = pattern.removeprefix("re:").replace("\\", "")
    close = difflib.get_close_matches(stem, words, n=3, cutoff=0.4) or names[:3]
    return TargetError(
        f"{pattern!r} matches no module of this model.",
        where=f"{where}; closest names: {', '.join(close) or 'none, the model has no submodules'}",
        fix=f"use a full module path or a glob such as {_example(close)!r}.",
    )


def _example(names: Sequence[str]) -> str:
    """Turn a name of this model into a glob, by starring its last number but one step."""
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if numbers and len(parts) > 1:
            return ".".join("*" if i == numbers[-1] else part for i, part in enumerate(parts))
    return "layer3.*.conv1"


def _quoted(patterns: Sequence[str]) -> str:
    return ", ".join(map(repr, patterns))
