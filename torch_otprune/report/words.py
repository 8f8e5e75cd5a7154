"""Numbers as a reader wants them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

__all__ = ["count", "error", "kept", "milliseconds", "short_names"]

_LONGEST = 9  # characters of one step of a path that is told in full
_UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def count(value: int) -> str:
    """Write a count with three significant digits.

    Args:
        value: parameters or MACs.

    Returns:
        such as `1.23M`.

    Example:
        >>> count(1_234_567), count(999_999), count(42)
        ('1.23M', '1M', '42')
    """
    for unit, size in _UNITS:
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def kept(after: float, before: float) -> str:
    """Write what is left as a share.

    Args:
        after: cost after.
        before: cost before, in the same unit.

    Returns:
        such as `49.8%`; a dash where there was nothing.
    """
    return f"{after / before:.1%}" if before else "-"


def error(value: float | None) -> str:
    """Write a relative error.

    Args:
        value: at least 0, maybe infinite; None where nothing was measured.

    Returns:
        such as `0.123`, `4.2e+06` or `infinite`.
    """
    if value is None:
        return "–"
    if value == float("inf"):
        return "infinite"
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"


def milliseconds(value: float) -> str:
    """Write a time with three significant digits.

    Args:
        value: milliseconds.

    Returns:
        such as `12.3 ms`.
    """
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def short_names(names: Sequence[str], most: int = 46) -> list[str]:
    """Shorten module paths until they fit, by what they share first.

    Args:
        names: module paths.
        most: characters that fit.

    Returns:
        one name each; unchanged if all fit.

    Example:
        >>> short_names(["encoder.layers.0.up", "encoder.layers.1.up"], most=10)
        ['…0.up', '…1.up']
    """
    if max(map(len, names), default=0) <= most:
        return list(names)
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = takewhile(lambda level: len(set(level)) == 1, levels)
    start = sum(len(level[0]) + 1 for level in shared)
    rest = [f"…{name[start:]}" if start else name for name in names]
    cut = [_clip(name, most) for name in rest]
    if len(set(cut)) == len(set(names)):
        return cut
    stems = (".".join(map(_stem, name.split("."))) if len(name) > most else name for name in rest)
    return [_clip(name, most) for name in stems]


def _stem(part: str) -> str:
    """Leave the head and the tail of one step of a path."""
    return part if len(part) <= _LONGEST else f"{part[:5]}…{part[-3:]}"


def _clip(name: str, most: int) -> str:
    """Cut out the middle; the head holds the numbers that tell layers apart."""
    tail = most // 3
    return name if len(name) <= most else f"{name[: most - 1 - tail]}…{name[-tail:]}"
