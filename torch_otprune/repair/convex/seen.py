"""What the dense and the cut model show around a rectified pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_otprune.repair.base import Patient
from torch_otprune.statistics.reduce import all_rows
from torch_otprune.structure.forward import evaluating, flat_tensors, run

__all__ = ["Seen", "decides", "look", "tapped"]


@dataclass(frozen=True)
class Seen:
    """What both models show around a pair; rows of all batches and ranks.

    Args:
        inputs: what the hidden layer reads in the cut model.
        home: the same channels in the dense one.
        answers: what the output layer writes in the dense model.
        labels: class numbers; None where not every batch has some.
    """

    inputs: Tensor
    home: Tensor
    answers: Tensor
    labels: Tensor | None

    def moved(self, level: float, between: Literal["pairs", "laws"]) -> Tensor:
        """Measure how far pruning moved each feature, at a quantile.

        Args:
            level: the quantile, over rows.
            between: `pairs` of rows, or `laws`: the optimal transport of equally many points on the
                line couples them by rank.

        Returns:
            one number per feature, in its unit.
        """
        ends = self.inputs.double(), self.home.double()
        if between == "laws":
            ends = ends[0].sort(dim=0).values, ends[1].sort(dim=0).values
        return (ends[0] - ends[1]).abs().quantile(level, dim=0)


class Tap:
    """Keep what a layer reads and writes."""

    def __init__(self) -> None:
        self.read: list[Tensor] = []
        self.written: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.read.append(args[0].detach().flatten(0, -2))
        self.written.append(out.detach().flatten(0, -2))


@torch.no_grad()
def tapped(model: nn.Module, pair: tuple[str, str], batches: Any) -> list[Tap]:
    """Run a model and keep what two of its layers read and wrote.

    Args:
        model: left as it was.
        pair: module paths.
        batches: calibration batches.

    Returns:
        one tap per layer, a table per call.
    """
    taps = [Tap() for _ in pair]
    hooks = [
        model.get_submodule(path).register_forward_hook(tap)
        for path, tap in zip(pair, taps, strict=True)
    ]
    try:
        with evaluating(model):
            for batch in batches:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return taps


def look(patient: Patient, pair: tuple[str, str]) -> Seen:
    """Run both models.

    Args:
        patient: both models and the data.
        pair: hidden and output layer.

    Returns:
        rows on the device of the cut model.
    """
    small, _ = tapped(patient.small, pair, patient.batches)
    home, away = tapped(patient.dense, pair, patient.batches)
    inputs, reads = (torch.cat(tap.read) for tap in (small, home))
    answers = torch.cat(away.written)
    ends = [s for cut in patient.every for s in cut.slices]
    left = set(range(reads.shape[1]))  # each cut names what it leaves of all
    for end in (s for s in ends if s.side == "in" and s.path == pair[0]):
        left &= set(end.keep)
    reads = reads[:, torch.tensor(sorted(left), device=reads.device)]
    kept = patient.kept(pair[1])
    answers = answers if kept is None else answers[:, kept.to(answers.device)]
    own = [_labels(batch) for batch in patient.batches]
    labels = None
    if own and all(found is not None for found in own):
        labels = torch.cat([found for found in own if found is not None]).to(inputs.device)
    device = inputs.device
    parts = [all_rows(part).to(device) for part in (inputs, reads, answers)]
    told = None if labels is None else all_rows(labels[:, None])[:, 0].long().to(device)
    return Seen(parts[0], parts[1], parts[2], told)


@torch.no_grad()
def decides(patient: Patient, output: str) -> bool:
    """Tell whether the largest answer of a layer is the largest of the model's output.

    Args:
        patient: both models and the data.
        output: the layer.

    Returns:
        whether it is, on the first batch, whatever monotone function comes behind.
    """
    batch = patient.batches[:1]
    tap = tapped(patient.dense, (output, output), batch)[0]
    with evaluating(patient.dense):
        found = [t for one in batch for t in flat_tensors(run(patient.dense, one))]
    made = torch.cat(tap.written)
    fits = [t.flatten(0, -2) for t in found if t.dim() > 1 and t.shape[-1] == made.shape[1]]
    return any(t.shape == made.shape and torch.equal(t.argmax(1), made.argmax(1)) for t in fits)


def _labels(batch: Any) -> Tensor | None:
    """Find class numbers: behind the inputs one per sample, under `labels` of any shape."""
    named = isinstance(batch, Mapping)
    if named:
        value = batch.get("labels")
    else:
        value = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(value, Tensor) or value.is_floating_point() or not value.dim():
        return None
    return value.flatten() if named or value.dim() == 1 else None
