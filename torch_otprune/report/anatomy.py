"""A diagnosis as a picture: what can become of all parameters, and which layers go together."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch_otprune.report.words import count, short_names
from torch_otprune.structure.doctor import FATES

if TYPE_CHECKING:
    from torch_otprune.doctor.model import Diagnosis

__all__ = ["draw_groups"]

_INK, _GRID, _SPARE = "#30343b", "#eceef2", "#d5d9e0"
_COLOURS = {
    "prunable": "#2f6db5",
    "protected": "#8fb0d6",
    "blocked": "#d9822b",
    "fixed": _SPARE,
}
_MOST_ROWS, _MOST_LAYERS, _MOST_SAID = 60, 90, 64
_ROW, _COLUMN, _FRAME, _LETTER = 0.24, 0.2, 1.4, 0.06  # inches
_LABELLED = 0.06  # share from which a part of the bar has room for its number


@dataclass(frozen=True)
class _Lane:
    """One row: a group, or channels that are tied and cannot go.

    Args:
        name: of the group.
        number: how many there are like it.
        said: its units and their kind, or why they stay.
        fate: what can become of them.
        members: module to the part it takes: `out`, `through` or `in`.
    """

    name: str
    number: int
    said: str
    fate: str
    members: dict[str, str]


def draw_groups(found: Diagnosis) -> bytes:
    """Draw what a diagnosis found: all parameters on top, below them a lane for every group.

    Groups that differ only in the numbers of their modules share a lane, drawn at the first.

    Args:
        found: the diagnosis.

    Returns:
        PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = list(_lanes(found))
    layers = list(dict.fromkeys(_ordered(found, lanes)))
    names = short_names(layers)
    labels = [_labels(lanes), [_short(lane.said) for lane in lanes]]
    beside = sum(max(map(len, side), default=0) for side in labels)  # left and right of the map
    width = max(8.4, 2.6 + _COLUMN * min(len(layers), _MOST_LAYERS) + _LETTER * beside)
    height = _FRAME + _ROW * max(len(lanes), 1) + _LETTER * max(map(len, [*names, ""]))
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    bar, map_ = figure.subplots(2, 1, height_ratios=[0.5, height - 1.0])
    _totals(bar, found)
    _map(map_, lanes, layers)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _lanes(found: Diagnosis) -> Iterator[_Lane]:
    from torch_otprune.doctor.text import families

    groups = list(families(found.groups))
    stuck = list(families(found.ailments))
    for name, number, ward in groups[:_MOST_ROWS]:
        sides = (("in", ward.consumers), ("through", ward.carriers), ("out", ward.producers))
        members = {path: side for side, paths in sides for path in paths}
        fate = "protected" if ward.protected else "prunable"
        yield _Lane(name, number, f"{ward.units} {ward.kind}", fate, members)
    for name, number, ailment in stuck[: max(_MOST_ROWS - len(groups), 0)]:
        said = str(ailment.obstacles[0]) if ailment.obstacles else ailment.reason
        fate = "fixed" if ailment.fix.startswith("nothing") else "blocked"
        yield _Lane(name, number, said, fate, dict.fromkeys(ailment.modules, "out"))


def _short(said: str) -> str:
    """Leave off the end of a reason that would push the map aside; the tables have it whole."""
    return said if len(said) <= _MOST_SAID else f"{said[: _MOST_SAID - 1].rstrip()}…"


def _labels(lanes: Sequence[_Lane]) -> list[str]:
    names = short_names([lane.name for lane in lanes])
    many = (f" (x{lane.number})" if lane.number > 1 else "" for lane in lanes)
    return [name + number for name, number in zip(names, many, strict=True)]


def _ordered(found: Diagnosis, lanes: Sequence[_Lane]) -> Iterator[str]:
    """List the modules of all lanes, in the order of the model's parameters."""
    wanted = {path for lane in lanes for path in lane.members}
    for finding in found.findings:
        owner = finding.parameter.rpartition(".")[0]
        yield from (path for path in (owner, finding.parameter) if path in wanted)
    yield from sorted(wanted)


def _totals(axes: Any, found: Diagnosis) -> None:
    """Draw all parameters as one bar."""
    axes.set_title(
        f"{found.model}: {count(found.params)} parameters", loc="left", fontsize=11, color=_INK
    )
    left = 0.0
    for fate in (f for f in FATES if found.elements(f)):
        share = found.share(fate)
        axes.barh(0, share, left=left, color=_COLOURS[fate], height=0.9, label=fate)
        if share > _LABELLED:
            ink = _INK if fate == "fixed" else "white"
            axes.text(left + share / 2, 0, f"{fate} {share:.1%}", color=ink, **_CENTRED)
        left += share
    axes.set_xlim(0, 1)
    axes.set_axis_off()


_CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}


def _map(axes: Any, lanes: Sequence[_Lane], layers: Sequence[str]) -> None:
    """Draw one lane per group, a mark at every layer that is cut with it."""
    place = {layer: x for x, layer in enumerate(layers)}
    for y, lane in enumerate(lanes):
        colour = _COLOURS[lane.fate] if lane.fate != "fixed" else "#a6acb5"
        xs = [place[path] for path in lane.members]
        axes.hlines(y, min(xs), max(xs), color=colour, linewidth=1.2, alpha=0.6, zorder=1)
        for side, marker, fill in (
            ("out", "o", colour),
            ("through", "|", colour),
            ("in", "o", "w"),
        ):
            at = [place[path] for path, part in lane.members.items() if part == side]
            face = {"color": colour} if marker == "|" else {"facecolor": fill, "edgecolor": colour}
            axes.scatter(at, [y] * len(at), marker=marker, s=22, **face)
        axes.text(len(layers) - 0.2, y, _short(lane.said), va="center", fontsize=7, color=_INK)
    _dress(axes, lanes, layers)


def _dress(axes: Any, lanes: Sequence[_Lane], layers: Sequence[str]) -> None:
    step = max(1, -(-len(layers) // _MOST_LAYERS))
    axes.set_yticks(range(len(lanes)), _labels(lanes), fontsize=7.5)
    axes.set_xticks(range(0, len(layers), step), short_names(layers[::step]), fontsize=6.5)
    axes.tick_params(axis="x", rotation=90, length=0, colors=_INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(lanes), 1) - 0.4, -0.6)  # first lane on top
    axes.set_xlim(-0.6, max(len(layers), 1) - 0.4)
    axes.grid(axis="x", color=_GRID, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    title = "Groups: filled, output channels go; tick, carried along; hollow, input channels go"
    axes.set_title(title, loc="left", fontsize=8, color=_INK)
