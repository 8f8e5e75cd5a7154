"""A hidden layer stands in for the block, and moves the stream no more than it must."""

from __future__ import annotations

from math import ceil
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.maps import MongeMap as Map
from torch_otprune.maps.monge_map import Descent
from torch_otprune.maps.samples import Samples
from torch_otprune.nn import Perceptron
from torch_otprune.plan.model import Drop
from torch_otprune.plan.replacement import register
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.replace.base import Fitted
from torch_otprune.repair.replace.low_rank import reduced_rank
from torch_otprune.statistics.patches import pick
from torch_otprune.statistics.reduce import all_rows
from torch_otprune.statistics.sites import real
from torch_otprune.statistics.taps import Taps, flat
from torch_otprune.structure.forward import batch_size, evaluating, run
from torch_otprune.structure.graph import Block
from torch_otprune.surgery.cut import put_

__all__ = ["MongeNet"]


@register
class MongeNet(Fitted):
    """Add what a hidden layer makes of the stream, fitted to pairs with a small Monge gap.

    It starts at the best map of half as low a rank, since two units of opposite sign make a
    linear one, and takes gradient steps from there as long as held-out rows gain.

    Limits: costs twice the units times the width in parameters and, per position, in MACs, and
    seconds to fit. Of a branch, nothing stands in.

    Source: Uscidda & Cuturi 2023 for the gap; the start and the use are ours.
    """

    stand_in: ClassVar[Literal["scale", "low_rank", "hidden"] | None] = "hidden"
    kind: Literal["monge_net"] = "monge_net"
    hidden: int = Field(default=32, ge=2, description="units, at most twice the width")
    rows: int = Field(default=4096, ge=8, description="rows that the layer is fitted on")
    map: Map = Field(default=Map(weight=0.01), description="weight and cost of the gap, and steps")

    def rank_for(self, block: Block) -> int:
        """Take an even number of units, at most twice the channels of the stream."""
        return min(self.hidden // 2, block.channels) * 2

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Fit what stands in for every block."""
        places = ((d, patient.small.get_submodule(d.block)) for d in patient.drops)
        # Of a branch nothing stands in.
        return tuple(self._fit(patient, d, m) for d, m in places if isinstance(m, Perceptron))

    def _fit(self, patient: Patient, drop: Drop, module: Perceptron) -> Note:
        x, y = _rows(patient, drop, self.rows)
        body = _started(module, x, y)
        unit = float(y.std(0).square().mean().sqrt().clamp_min(1e-12))
        text = Descent(self.map, Samples(x, y, (x, y)), body, unit).run()
        with torch.no_grad():
            power = y.square().sum().clamp_min(1e-300)
            before, after = (float((z - y).square().sum() / power) for z in (x, body(x)))
        for name, value in body.named_parameters():
            put_(module, name, value)
        return Note(self.kind, drop.block, before, after, accepted=True, text=text)


def _started(module: Perceptron, x: Tensor, y: Tensor) -> nn.Module:
    """Make a layer in float64 that writes the best map of low rank; channels come last."""
    body = Perceptron(module.channels, module.hidden).double()
    mean = x.mean(0)
    around, change = x - mean, y - x
    cov, cross = around.T @ around / len(x), around.T @ (change - change.mean(0)) / len(x)
    up, down = reduced_rank(cov, cross, min(module.hidden // 2, module.channels))
    spare = module.hidden - 2 * len(down)  # a cut stream may have fewer channels than that
    with torch.no_grad():
        # gelu(z) - gelu(-z) = z
        body.up.copy_(F.pad(torch.cat([up, -up], dim=1), (0, spare)))
        body.down.copy_(F.pad(torch.cat([down, -down]), (0, 0, 0, spare)))
        body.centre.copy_(-mean)
        body.shift.copy_(change.mean(0))
    return body


def _rows(patient: Patient, drop: Drop, wanted: int) -> tuple[Tensor, Tensor]:
    """Gather the stream of the dense network in front of a block and behind it."""
    block = patient.graph.block(drop.block)
    kept, found = patient.kept(block.like), []
    each = ceil(wanted / max(sum(map(batch_size, patient.batches)), 1))
    with evaluating(patient.dense), torch.no_grad():
        for batch in patient.batches:
            with Taps(patient.dense, [block], ()) as taps:
                run(patient.dense, batch)
            x, y = (flat(t, block.axis) for t in taps.pairs[block.name])
            at = pick(x.shape[1], each, block.name, patient.seed)
            told = real(batch, *x.shape[:2])[:, at]
            both = torch.cat([t[:, at][told] for t in (x, y)], dim=1)
            found.append(both)
    rows = all_rows(torch.cat(found))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:wanted]
    x, y = rows[order].chunk(2, dim=1)
    return (x, y) if kept is None else (x[:, kept], y[:, kept])
