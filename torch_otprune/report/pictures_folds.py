"""Space folds as a picture: what each layer switches, what it adds, and folds along the path."""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from torch_otprune.report.words import short_names

if TYPE_CHECKING:
    from torch_otprune.report.folds import Folds

__all__ = ["draw_folds"]

_COLOURS = ("#2f6db5", "#d9822b", "#30343b")
_ROW, _FRAME = 0.26, 1.4  # inches per row; inches for title and axis


def draw_folds(found: Folds, path: str | PathLike[str]) -> None:
    """Draw three charts side by side: bends per layer, folds per layer, folds along the path.

    Args:
        found: the numbers.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    # No pyplot: nothing is registered, and no backend is chosen for the user.
    height = max(3.6, _FRAME + _ROW * len(found.layers))
    figure = Figure(figsize=(13, height), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    _bends(first, found)
    _folds(second, found)
    _running(third, found)
    figure.suptitle(f"{found.paths} straight paths between {found.pairs} samples", fontsize=10)
    figure.savefig(fspath(path), dpi=120)


def _rows(axes: Any, found: Folds, title: str) -> list[int]:
    places = list(range(len(found.layers)))
    axes.set_yticks(places, short_names([x.name for x in found.layers]), fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=9)
    return places


def _bends(axes: Any, found: Folds) -> None:
    places = _rows(axes, found, "how much each rectifier bends: rank by this")
    axes.barh(
        [y - 0.2 for y in places],
        [x.residual for x in found.layers],
        height=0.38,
        color=_COLOURS[0],
        label="affine residual",
    )
    axes.barh(
        [y + 0.2 for y in places],
        [x.switch for x in found.layers],
        height=0.38,
        color=_COLOURS[1],
        label="switches per unit and path",
    )
    axes.legend(fontsize=7)


def _folds(axes: Any, found: Folds) -> None:
    places = _rows(axes, found, "what it folds: inherited (dots), added (bars)")
    added = [x.increment for x in found.layers]
    axes.barh(places, added, height=0.5, color=_COLOURS[0], label="increment")
    axes.plot(
        [x.score for x in found.layers], places, "o", color=_COLOURS[1], ms=4, label="own score"
    )
    axes.plot(
        [x.weighted_score for x in found.layers],
        places,
        "x",
        color=_COLOURS[2],
        ms=4,
        label="own score, by bend",
    )
    axes.axvline(0, color=_COLOURS[2], linewidth=0.6)
    axes.legend(fontsize=7)


def _running(axes: Any, found: Folds) -> None:
    """Draw the score of all rectifiers up to some of them, along the path."""
    last = len(found.layers) - 1
    chosen = sorted({0, last // 3, 2 * last // 3, last})
    names = short_names([x.name for x in found.layers])
    for i in chosen:
        curve = found.layers[i].running
        axes.plot([k / (len(curve) - 1) for k in range(len(curve))], curve, label=f"to {names[i]}")
    axes.set_title("fold score along the path", fontsize=9)
    axes.set_xlabel("share of the way", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
