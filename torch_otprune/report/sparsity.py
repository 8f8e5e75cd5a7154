"""Zeros in words: a table of the layers, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch_otprune.report.words import error, kept

if TYPE_CHECKING:
    from torch_otprune.repair.zeros import LayerZeros
    from torch_otprune.report.model import Report

__all__ = ["ZERO_HEAD", "zero_rows", "zero_verdicts"]

ZERO_HEAD = ("weights of", "pattern", "not zero", "zeros alone", "refitted", "W2 at most", "radius")


def zero_rows(zeros: Sequence[LayerZeros]) -> list[tuple[str, ...]]:
    """List layers with zeros, in order of execution.

    Args:
        zeros: what was measured.

    Returns:
        rows that go with `ZERO_HEAD`; errors are relative to the layer's dense output.
    """
    return [
        (
            entry.layer,
            entry.pattern,
            kept(entry.left, entry.weights),
            error(entry.masked),
            error(entry.error),
            error(entry.distance),
            error(entry.radius),
        )
        for entry in zeros
    ]


def zero_verdicts(report: Report) -> Iterator[str]:
    """Say what zeros save, what bounds them, and where something is to be known.

    Args:
        report: what was measured.

    Yields:
        sentences without a full stop.
    """
    if not report.zeros:
        return
    total, left = (sum(getattr(e, name) for e in report.zeros) for name in ("weights", "left"))
    yield (
        f"{kept(total - left, total)} of the weights in {len(report.zeros)} layers are zero: "
        "parameters and MACs count them, and only kernels that skip zeros run faster"
    )
    found = report.bound
    if found is not None and found.certified is not None:
        promise = "" if found.promised is None else f", {error(found.promised)} was promised"
        yield (
            f"on the calibration data, W2 at the output of '{found.layer}' is at most "
            f"{error(found.certified)}{promise}"
        )
    elif found is not None:
        yield f"there is no bound at the output: {found.reason}"
    for entry in report.zeros:
        if entry.note:
            yield f"'{entry.layer}': {entry.note}"
