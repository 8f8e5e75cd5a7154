"""Before and after, measured on the calibration data, as one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torch_otprune.errors import VerificationError
from torch_otprune.fold import refolded
from torch_otprune.plan import Cost, Plan, stand_ins
from torch_otprune.repair import Note
from torch_otprune.repair.blocks import blocks
from torch_otprune.report import (
    LayerError,
    OutputError,
    RepairNote,
    Report,
    agreement,
    count_macs,
    count_params,
    environment,
    images_of,
    latency,
    layer_errors,
    output_error,
    per_layer_error,
)
from torch_otprune.structure import Graph, batch_size, evaluating, map_tensors, run
from torch_otprune.surgery import gone

__all__ = ["Progress", "Stopwatch", "measure_layers", "quiet", "verify"]

Progress = Callable[[str, int, int], None]
_ENOUGH = 256  # samples for errors and agreement; latency takes one batch


def quiet(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


class Stopwatch:
    """Seconds by stage, told to a listener.

    Args:
        progress: the listener.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time one stage."""
        self.progress(stage, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        self.progress(stage, 1, 1)


def verify(
    models: tuple[nn.Module, nn.Module, nn.Module],
    graph: Graph,
    plan: Plan,
    batches: Sequence[Any],
    *,
    example: Any,
    layers: tuple[LayerError, ...],
    added: Mapping[str, int],
    notes: Sequence[Note],
    seconds: Mapping[str, float],
    timing: float,
) -> Report:
    """Measure what a pruning did.

    Args:
        models: the original, the cut model before repair, and after it.
        graph: the original's analysis.
        plan: what was carried out.
        batches: calibration batches.
        example: what the graph was traced on.
        layers: what `measure_layers` found.
        added: what lines and folds add to each cost at this size, as predicted.
        notes: what the repairs did.
        seconds: time by stage so far.
        timing: seconds to spend on measuring latency; 0 leaves it out.

    Returns:
        the report.

    Raises:
        VerificationError: if parameters or MACs are not what the plan predicted.
    """
    dense, _, small = models
    some = _some(batches)
    costs = _costs((dense, small), graph, plan, batch=example, added=added)
    expected, cut, mended = (_outputs(net, some) for net in models)
    off = OutputError(
        before_repair=output_error(expected, cut), after_repair=output_error(expected, mended)
    )
    return Report(
        plan=plan,
        **costs,
        latency=latency(dense, small, some[0], seconds=timing) if timing > 0 else None,
        layers=layers,
        agreement=agreement(expected, mended),
        output_error=off,
        repairs=tuple(_noted(note) for note in notes),
        images=images_of({"dense": expected, "cut": cut, "repaired": mended}),
        seconds=dict(seconds),
        environment=environment(),
    )


def measure_layers(
    models: tuple[nn.Module, nn.Module, nn.Module],
    graph: Graph,
    plan: Plan,
    batches: Sequence[Any],
) -> tuple[LayerError, ...]:
    """Measure layer by layer how far the cut model is from the original, while paths agree.

    Args:
        models: the original, the cut model before repair, and after it.
        graph: the original's analysis.
        plan: what was carried out.
        batches: calibration batches.

    Returns:
        errors of the layers whose outputs have the same shape in all models.
    """
    dense, *others = models
    some, places = _some(batches), _places(dense, graph, plan)
    left = [{path for path, _ in net.named_modules()} for net in others]
    paths = [path for path in places if all(path in names for names in left)]
    return layer_errors(*(per_layer_error(dense, net, some, paths) for net in others))


def _places(dense: nn.Module, graph: Graph, plan: Plan) -> list[str]:
    """List the blocks around cuts, and the linear layers that write straight to what follows."""
    # Where an output is added to a stream, a repair may rightly change it to mend the stream.
    around = [path for path in blocks(dense, plan.cuts) if not gone(plan.drops, path)]
    left, aims = refolded(graph, plan)
    straight = [p for p in left.order if not (p in left.tails and left.tails[p].added)]
    straight = [aims[p][0] if p in aims else p for p in straight if not gone(plan.drops, p)]
    order = [name for name, _ in dense.named_modules()]
    return sorted({*around, *straight}, key=order.index)


def _noted(note: Note) -> RepairNote:
    return RepairNote(
        kind=note.kind,
        site=note.site,
        before=note.before,
        after=note.after,
        accepted=note.accepted,
        note=note.text,
    )


def _costs(
    models: tuple[nn.Module, nn.Module],
    graph: Graph,
    plan: Plan,
    *,
    batch: Any,
    added: Mapping[str, int],
) -> dict[str, Cost]:
    """Count both models and hold the cost model to its word, on the batch that it was made of."""
    dense, small = models
    keep = graph.full() | plan.keep()
    removed = [graph.block(drop.block) for drop in plan.drops]
    instead, widths = stand_ins(plan, graph), graph.widths(removed)
    found = {
        "params": Cost(before=count_params(dense), after=count_params(small)),
        "macs": Cost(before=count_macs(dense, batch), after=count_macs(small, batch)),
    }
    for name, cost in found.items():
        model = graph.costs[name].gated(removed, instead[name], widths)
        promised = model.at(keep) + added[name]
        # what a router sends where depends on the numbers; an einsum over one unit is no product
        spare = name == "macs" and (bool(graph.routes) or cost.after < promised)
        if cost.after != promised and not spare:
            raise VerificationError(
                f"{name} are {cost.after:,}; the plan predicted {promised:,}.",
                where=f"Plan.{name}",
                fix="report the model: its cost model misses an op.",
            )
    return found


def _some(batches: Sequence[Any]) -> list[Any]:
    chosen, seen = [], 0
    for batch in batches:
        chosen.append(batch)
        seen += batch_size(batch)
        if seen >= _ENOUGH:
            break
    return chosen


def _outputs(model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    with evaluating(model), torch.no_grad():
        return [map_tensors(run(model, batch), lambda t: t.cpu()) for batch in batches]
