"""The report as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch_otprune.report.sparsity import ZERO_HEAD, zero_rows
from torch_otprune.report.words import count, error, kept, milliseconds

if TYPE_CHECKING:
    from torch_otprune.plan.model import Cost, Plan
    from torch_otprune.report.model import LayerError, Report

__all__ = [
    "Section",
    "depth_sections",
    "layer_rows",
    "plan_costs",
    "render",
    "tabulated",
    "total_rows",
]

_WIDTH, _WORST = 100, 10


class Section(NamedTuple):
    """One kind of what a plan does in depth, as a table; the last column says why."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: tuple[int, ...]


def render(report: Report) -> str:
    """Write verdicts, totals, and the layers that suffered most.

    Args:
        report: what was measured.

    Returns:
        lines of at most 100 characters, without colour.
    """
    worst = sorted(report.layers, key=lambda layer: -layer.after_repair)[:_WORST]
    parts = [_verdicts(report), tabulated(("", "dense", "pruned", "kept"), total_rows(report))]
    parts += [tabulated(s.head[:-1], _brief(s.rows)) for s in depth_sections(report.plan)]
    if report.zeros:
        parts.append(tabulated(ZERO_HEAD, _few(zero_rows(report.zeros))))
    if worst:
        parts.append(tabulated(("layer", "before repair", "after repair"), layer_rows(worst)))
    if (learns := report.trainability) is not None:
        parts.append(_capture([f"- {verdict}" for verdict in learns.verdicts]))
        parts.append(tabulated(("tangent kernel", "dense", "pruned"), learns.rows()))
    if notes := [f"note: {note}" for note in report.plan.notes if note.startswith("MACs ")]:
        parts.append(_capture(notes))
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
    costs = [("parameters", report.params), ("MACs", report.macs)]
    if report.plan.layers.before:
        costs.append(("layers on offer", report.plan.layers))
    rows = [
        (name, count(cost.before), count(cost.after), kept(cost.after, cost.before))
        for name, cost in costs
    ]
    if (time := report.latency) is not None:
        before, after = (milliseconds(t.median) for t in (time.before, time.after))
        share = kept(time.after.median, time.before.median)
        rows.append((f"time per batch of {time.samples}", before, after, share))
    return rows


def plan_costs(plan: Plan) -> list[tuple[str, Cost]]:
    """List the measures that a plan speaks of.

    Args:
        plan: the decisions.

    Returns:
        name and cost; layers only where some were on offer.
    """
    costs = [("params", plan.params), ("macs", plan.macs)]
    return [*costs, ("layers", plan.layers)] if plan.layers.before else costs


def depth_sections(plan: Plan) -> Iterator[Section]:
    """Tabulate the removed layers, the activations that become linear, and the folds.

    Args:
        plan: the decisions; an error is in the unit that its reason names.

    Yields:
        one section for each of these that there is.
    """
    gone = [(d.block, d.replace, error(d.error), d.reason) for d in plan.drops]
    bends = [(x.site, x.surrogate, error(x.error), x.reason) for x in plan.lines]
    folds = [
        (" + ".join(f.layers), f.into, f.kind, _change(f.params), _change(f.macs), f.reason)
        for f in plan.foldings
    ]
    if gone:
        head = ("removed layer", "stands in", "predicted error", "why")
        yield Section("Removed layers", head, gone, (2,))
    if bends:
        head = ("linear activation", "becomes", "predicted error", "why")
        yield Section("Activations made linear", head, bends, (2,))
    if folds:
        names = ("folded layers", "into", "promise", "params", "MACs", "why")
        yield Section("Folds", names, folds, (3, 4))


def _change(cost: Cost) -> str:
    return f"{cost.before:,} -> {cost.after:,}"


def layer_rows(layers: Iterable[LayerError]) -> list[tuple[str, str, str]]:
    """List layer errors.

    Args:
        layers: what was measured.

    Returns:
        rows of path, error before repair, error after it.
    """
    return [(layer.path, error(layer.before_repair), error(layer.after_repair)) for layer in layers]


def _few(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Name the first few."""
    return _brief([(*row, "") for row in rows])


def _brief(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Name the first few, without their reasons."""
    shown = [row[:-1] for row in rows[:_WORST]]
    rest = len(rows) - len(shown)
    return [*shown, (f"and {rest} more", *[""] * (len(rows[0]) - 2))] if rest else shown


def _verdicts(report: Report) -> str:
    return _capture([f"- {sentence}" for sentence in report.verdicts])


def tabulated(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Set a table as plain text.

    Args:
        head: names of the columns; the first column is set left, the others right.
        rows: their cells.

    Returns:
        lines of at most 100 characters.
    """
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
