"""The report as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch_otprune.report.words import count, error, kept, milliseconds

if TYPE_CHECKING:
    from torch_otprune.report.model import LayerError, Report

__all__ = ["layer_rows", "render", "total_rows"]

_WIDTH, _WORST = 100, 10


def render(report: Report) -> str:
    """Write verdicts, totals, and the layers that suffered most.

    Args:
        report: what was measured.

    Returns:
        lines of at most 100 characters, without colour.
    """
    worst = sorted(report.layers, key=lambda layer: -layer.after_repair)[:_WORST]
    parts = [_verdicts(report), _table(("", "dense", "pruned", "kept"), total_rows(report))]
    if worst:
        parts.append(_table(("layer", "before repair", "after repair"), layer_rows(worst)))
    if rest := len(report.layers) - len(worst):
        parts.append(f"and {rest} layers with smaller errors\n")
    times = ", ".join(f"{stage} {time:.1f} s" for stage, time in report.seconds.items())
    return "\n".join([*parts, f"plan {report.plan_hash[:12]}  {times}"]).rstrip()


def total_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """List what the model cost before and after.

    Args:
        report: what was measured.

    Returns:
        rows of name, dense, pruned, share kept.
    """
    rows = [
        (name, count(cost.before), count(cost.after), f"{kept(cost.after, cost.before)}")
        for name, cost in (("parameters", report.params), ("MACs", report.macs))
    ]
    if (time := report.latency) is not None:
        before, after = (milliseconds(t.median) for t in (time.before, time.after))
        share = kept(time.after.median, time.before.median)
        rows.append((f"time per batch of {time.samples}", before, after, share))
    return rows


def layer_rows(layers: Iterable[LayerError]) -> list[tuple[str, str, str]]:
    """List layer errors.

    Args:
        layers: what was measured.

    Returns:
        rows of path, error before repair, error after it.
    """
    return [(layer.path, error(layer.before_repair), error(layer.after_repair)) for layer in layers]


def _verdicts(report: Report) -> str:
    return _capture([f"- {sentence}" for sentence in report.verdicts])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return _capture([table])


def _capture(renderables: Iterable[object]) -> str:
    from rich.console import Console

    stream = io.StringIO()
    console = Console(
        file=stream, width=_WIDTH, color_system=None, markup=False, highlight=False, emoji=False
    )
    for renderable in renderables:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
