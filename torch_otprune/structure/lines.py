"""Which line of code to name: one that the user can change."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["blamed"]

_INSTALLED = ("/site-packages/", "/dist-packages/", "/lib/python3")


def blamed(frames: Iterable[tuple[str, str, int]]) -> str:
    """Choose the line that a user can change among those that led to an op.

    A helper of another package, as one that rearranges axes, is not to blame for what it is
    given; a model of another package is.

    Args:
        frames: path of the file, function and line, the innermost first.

    Returns:
        `file.py:12`: the innermost line of the user's own, or of a package that has a forward
        further in; empty where there is none.
    """
    inner = ""
    for path, function, line in frames:
        place = f"{path.rpartition('/')[2]}:{line}"
        if not any(part in path for part in _INSTALLED):
            return place
        inner = inner or place
        if function == "forward":
            return inner
    return inner
