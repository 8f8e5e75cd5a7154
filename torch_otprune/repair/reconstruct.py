"""Train the cut network, all blocks at once, towards what the dense blocks put out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from torch_otprune.criteria.base import Need
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.blocks import blocks
from torch_otprune.repair.descend import Descent, learning
from torch_otprune.repair.goals import HALF, Goals, Taps, halves, pieces
from torch_otprune.repair.least_squares import LeastSquares
from torch_otprune.statistics.reduce import first_rank_
from torch_otprune.structure.forward import batch_size, evaluating
from torch_otprune.surgery.exchange import gone

__all__ = ["Reconstruct"]

_HELD, _ASKED = 8, 512  # one batch in this many is held out; no more samples than this
_MIB = 2**20


@register
class Reconstruct(Repair):
    """Refit by least squares, then take gradient steps on unlabelled data towards the dense blocks.

    Every step runs the cut model on a few calibration samples and lowers the squared distance of
    all cut blocks' outputs, and of the network's outputs, from the dense ones; each distance is
    relative to the dense signal's power, so that all blocks count alike, and padding does not
    count. Every sample comes up once before any comes up again. The step size rises, then falls
    along a cosine. Inputs of a block come from the cut prefix, so that later blocks correct
    earlier ones. Batch-norms keep their statistics, tables of embeddings their rows. Blocks in
    front of removed ones are held to what those put out.

    Held-out batches never meet a step. Now and then they are asked how far the outputs are off;
    the weights that they like best stay, those before the first step included.

    Many samples are worth more than many steps: a few hundred learnt by heart help nobody. So the
    refit, which holds all of its samples in memory, may see fewer.

    Limits: weights in half precision swallow such small steps and are left as the refit made
    them. Nothing here sees a label.

    Source: block-wise reconstruction as in Li et al. 2021 (BRECQ), section 3.2; all blocks at
    once, by shares of their power, are ours.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})
    refits: ClassVar[bool] = True

    kind: Literal["reconstruct"] = "reconstruct"
    steps: int = Field(default=400, ge=1, description="gradient steps")
    rate: float = Field(default=5e-4, gt=0, description="Adam's peak step size")
    samples: int = Field(default=64, ge=1, description="samples per step, all of one batch")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps to the peak")
    checks: int = Field(default=4, ge=1, description="how often held-out samples are asked")
    precision: Literal["full", "bfloat16"] = Field(
        default="full", description="of the steps' passes; weights and checks stay as they are"
    )
    seconds: float = Field(
        default=600.0, gt=0, description="time for the steps; the schedule shrinks to it"
    )
    memory: int = Field(default=1024, ge=0, description="MiB of dense outputs kept for reuse")
    outputs: float = Field(default=1.0, ge=0, description="weight of the network's outputs")
    least_squares: LeastSquares | None = Field(
        default=LeastSquares(), description="the refit to start from; null starts from the cut"
    )
    refit_samples: int = Field(
        default=2048, ge=1, description="samples that the refit sees at most; it holds all at once"
    )

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Refit, then descend; keep the result if held-out samples agree."""
        some = replace(patient, batches=_spread(patient.batches, self.refit_samples))
        first = self.least_squares.apply_(some) if self.least_squares else ()
        if any(p.dtype in HALF for p in patient.small.parameters()):
            text = "half precision: steps would be lost in rounding"
            return (*first, Note(self.kind, "model", None, None, accepted=False, text=text))
        with (
            evaluating(patient.dense),
            evaluating(patient.small),
            torch.enable_grad(),
            learning(patient.small) as live,
        ):
            if live:
                return (*first, self._descend(patient, live))
        text = "no parameter that could learn"
        return (*first, Note(self.kind, "model", None, None, accepted=False, text=text))

    def _descend(self, patient: Patient, live: Sequence[nn.Parameter]) -> Note:
        train, held = _split(patient.batches)
        paths = _counterparts(patient)
        with (
            Taps(patient.dense, sorted(set(paths.values()))) as teacher,
            Taps(patient.small, tuple(paths)) as pupil,
        ):
            goals = Goals(teacher, paths, self.memory * _MIB)
            half = self.precision == "bfloat16"
            descent = Descent(pupil, goals, held, live, half=half, project=_projection(patient))
            before = descent.distance(together=True)
            start = [p.detach().clone() for p in live]
            done = self._run_(descent, patient, train)
            first_rank_(live)
            after = descent.distance(together=True)
            if after <= before:
                text = "" if done == self.steps else f"{done} steps in {self.seconds:g} s"
                return Note(self.kind, "model", before, after, accepted=True, text=text)
            descent.kept = start
            descent.restore_()
        text = f"held-out samples would be {after:.3f} off"
        return Note(self.kind, "model", before, before, accepted=False, text=text)

    def _run_(self, descent: Descent, patient: Patient, train: Sequence[Any]) -> int:
        generator = torch.Generator("cpu").manual_seed(patient.seed)

        def told(done: int) -> None:
            patient.progress("reconstruct", done, self.steps)

        return descent.run_(
            pieces(train, self.samples, generator),
            generator,
            steps=self.steps,
            rate=self.rate,
            warmup=self.warmup,
            checks=self.checks,
            seconds=self.seconds,
            outputs=self.outputs,
            progress=told,
        )


def _projection(patient: Patient) -> Callable[[], None] | None:
    """Bring weights that must not be negative back after every step."""
    if patient.keeper is None or not patient.signs:
        return None
    return partial(patient.keeper.project_, patient.small, patient.signs)


def _spread(batches: Sequence[Any], samples: int) -> list[Any]:
    """Take evenly spaced batches of so many samples together, at least one."""
    total = sum(map(batch_size, batches))
    count = max(1, min(len(batches), len(batches) * samples // total))
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]


def _split(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Hold every eighth batch out, or fewer of many; a single batch is split by samples."""
    if len(batches) == 1:
        batches = halves(batches[0], last=-(-batch_size(batches[0]) // _HELD))
    every = max(_HELD, sum(map(batch_size, batches)) // _ASKED)
    at = set(range(every - 1, len(batches), every)) or {len(batches) - 1}
    train = [b for i, b in enumerate(batches) if i not in at]
    return train, [batches[i] for i in sorted(at)]


def _counterparts(patient: Patient) -> dict[str, str]:
    """Map every block whose output is compared to the dense block that it is compared with.

    A cut block is compared with itself. In a row of blocks that lost some, every one that stays
    is compared with the last of the removed ones that follow it.

    Returns:
        paths of the cut model to paths of the dense one.
    """
    found = {p: p for p in blocks(patient.dense, patient.cuts) if not gone(patient.gone, p)}
    removed = {drop.block for drop in patient.drops}
    around = [b for b in patient.graph.blocks if b.name in removed]
    chains = {(b.chain, b.kind, b.level) for b in around if b.kind == "block"}
    front: dict[tuple[str, str, str], str] = {}  # chains may lie inside one another
    for block in patient.graph.blocks:
        chain = (block.chain, block.kind, block.level)
        if chain not in chains:
            continue
        if not gone(patient.gone, block.name):
            front[chain] = block.name
            found[block.name] = block.name
        elif chain in front:
            found[front[chain]] = block.name
    return found
