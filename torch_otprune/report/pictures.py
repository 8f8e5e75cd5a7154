"""The report as pictures: widths, layer errors, totals, outputs that are images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch_otprune.report.words import count, error, milliseconds, short_names

if TYPE_CHECKING:
    from torch_otprune.plan.model import Cut
    from torch_otprune.report.images import Images
    from torch_otprune.report.model import LayerError, Report

__all__ = ["draw"]

_DENSE, _PRUNED, _BROKEN, _INK = "#d5d9e0", "#2f6db5", "#d9822b", "#30343b"
_MOST_ROWS = 60
_ROW, _FRAME = 0.24, 1.1  # inches per row; inches for title and axis
_FAR = 2.0  # relative errors beyond are drawn at the edge, with their number


def draw(report: Report) -> dict[str, bytes]:
    """Draw every picture that the report has numbers for.

    Args:
        report: what was measured.

    Returns:
        name to PNG: `totals`, `outputs`, `widths`, `layers`.
    """
    pictures = {"totals": _totals(report)}
    if report.images is not None:
        pictures["outputs"] = _images(report, report.images)
    if report.plan.cuts:
        pictures["widths"] = _widths(report.plan.cuts)
    if report.layers:
        pictures["layers"] = _layers(report.layers)
    return pictures


def _totals(report: Report) -> bytes:
    costs = [("parameters", report.params), ("MACs", report.macs)]
    if report.plan.layers.before:
        costs.append(("layers on offer", report.plan.layers))
    rows: list[tuple[str, float, str, str]] = [
        (name, cost.ratio, count(cost.before), count(cost.after)) for name, cost in costs
    ]
    whisker = None
    if (time := report.latency) is not None:
        dense, pruned = time.before.median, time.after.median
        rows.append(("time per batch", pruned / dense, milliseconds(dense), milliseconds(pruned)))
        whisker = (time.after.low / dense, time.after.high / dense)
    axes, figure = _axes(len(rows), "What is left, of the dense model", row=0.5)
    places, shares = range(len(rows)), [row[1] for row in rows]
    axes.barh(places, [1.0] * len(rows), color=_DENSE, height=0.62, label="dense")
    axes.barh(places, shares, color=_PRUNED, height=0.62, label="pruned")
    if whisker is not None:
        axes.hlines(len(rows) - 1, *whisker, color=_INK, linewidth=1.5)
    edge = max([1.0, *shares, *(whisker or ())])
    for y, (_, share, before, after) in enumerate(rows):
        axes.text(edge * 1.02, y, f"{before} → {after} ({share:.0%})", va="center", fontsize=9)
    axes.set_xlim(0, edge * 1.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
    return _finish(axes, figure, [row[0] for row in rows])


def _widths(cuts: Sequence[Cut]) -> bytes:
    shown = _chosen(cuts, [len(cut.keep) / cut.units for cut in cuts])
    axes, figure = _axes(len(shown), _title("Units per group", len(shown), len(cuts), "most cut"))
    rows = range(len(shown))
    axes.barh(rows, [cut.units for cut in shown], color=_DENSE, height=0.7, label="dense")
    axes.barh(rows, [len(cut.keep) for cut in shown], color=_PRUNED, height=0.7, label="kept")
    widest = max(cut.units for cut in shown)
    for y, cut in enumerate(shown):
        axes.text(cut.units + widest * 0.012, y, f"{len(cut.keep)} of {cut.units}", **_SMALL)
    axes.set_xlim(0, widest * 1.16)
    axes.set_xlabel("units", fontsize=9)
    return _finish(axes, figure, [cut.group for cut in shown])


def _layers(layers: Sequence[LayerError]) -> bytes:
    shown = _chosen(layers, [-layer.after_repair for layer in layers])
    title = _title("Output error of each layer", len(shown), len(layers), "largest")
    axes, figure = _axes(len(shown), title)
    before, after = ([getattr(e, f"{w}_repair") for e in shown] for w in ("before", "after"))
    edge = min(max([*before, *after, 1e-3]), _FAR)
    rows = range(len(shown))
    near = ([min(v, edge) for v in before], [min(v, edge) for v in after])
    axes.hlines(rows, *near, color=_DENSE, linewidth=2.5, zorder=1)
    axes.scatter(near[0], rows, facecolor="white", edgecolor=_BROKEN, s=30, label="before repair")
    axes.scatter(near[1], rows, color=_PRUNED, s=30, label="after repair")
    for y, values in enumerate(zip(before, after, strict=True)):
        if far := ", ".join(error(value) for value in values if value > edge):
            axes.text(edge * 1.02, y, f"→ {far}", **_SMALL)
    axes.set_xlim(-0.02 * edge, edge * (1.16 if max([*before, *after]) > edge else 1.04))
    axes.set_xlabel("relative error of the output", fontsize=9)
    return _finish(axes, figure, [layer.path for layer in shown])


def _images(report: Report, images: Images) -> bytes:
    """Put the same outputs of the dense, the cut and the repaired model below one another."""
    off = report.output_error
    said = {"cut": error(off.before_repair), "repaired": error(off.after_repair)}
    samples, height, width, _ = images.shape
    figure = _figure(0.6 + len(images.rows) * (7.0 * height / (samples * width) + 0.1))
    figure.suptitle("A few outputs, before and after", x=0.01, ha="left", fontsize=11, color=_INK)
    grid = figure.subplots(len(images.rows), 1)
    for axis, name in zip(grid, images.rows, strict=True):
        strip = images.pixels(name).transpose(0, 1).reshape(height, samples * width, -1)
        axis.imshow(strip.expand(-1, -1, 3).numpy(), interpolation="nearest")
        label = f"{name}\n{said[name]} off" if name in said else name
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, color=_INK)
        axis.set_xticks([])
        axis.set_yticks([])
    return _png(figure)


_SMALL: dict[str, Any] = {"va": "center", "fontsize": 7.5, "color": _INK}


def _chosen(rows: Sequence[Any], rank: Sequence[float]) -> list[Any]:
    """Keep the rows of lowest rank where there are too many, in their own order."""
    best = sorted(range(len(rows)), key=lambda i: rank[i])[:_MOST_ROWS]
    return [rows[i] for i in sorted(best)]


def _title(title: str, shown: int, total: int, which: str) -> str:
    return title if shown == total else f"{title}: the {shown} {which} of {total}"


def _axes(rows: int, title: str, row: float = _ROW) -> tuple[Any, Any]:
    figure = _figure(_FRAME + row * rows)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=22)
    return axes, figure


def _figure(height: float) -> Any:
    """Open a figure of our own: pyplot's global state and backend are the user's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Any, figure: Any, names: Sequence[str]) -> bytes:
    axes.set_yticks(range(len(names)), short_names(names), fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)  # first row on top
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, color=_INK)
    axes.grid(axis="x", color="#eceef2", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8,
        borderaxespad=0.2, handlelength=1.2,
    )  # fmt: skip
    return _png(figure)


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
