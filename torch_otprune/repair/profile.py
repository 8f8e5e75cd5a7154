"""What a unit is compared by: the weights that write it, those that read it, or its signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.errors import RepairError
from torch_otprune.statistics.evidence import Evidence, gather
from torch_otprune.statistics.filters import gain_and_shift
from torch_otprune.statistics.reduce import all_rows
from torch_otprune.statistics.signals import hear
from torch_otprune.structure.graph import Graph, Group, Member
from torch_otprune.structure.layers import BatchNorm, axes, norm_behind, shared, tensor

__all__ = ["Features", "profile"]

Features = Literal["producers", "group", "activations"]


def profile(
    model: nn.Module,
    graph: Graph,
    group: Group,
    features: Features,
    *,
    batches: Sequence[Any] = (),
    seed: int = 0,
) -> Float[Tensor, "units features"]:
    """Lay the features of a group's units out.

    Args:
        model: any model with that analysis.
        graph: the analysis.
        group: the group.
        features: which; weights have the batch-norm behind them folded in and come with their
            biases, every layer brought to size one by itself.
        batches: what `activations` are of.
        seed: chooses the positions that are looked at.

    Returns:
        one row per unit, in float64 on the CPU.

    Raises:
        RepairError: if activations are asked for and there are none.
    """
    ties = shared(model)
    heard = {}
    if features == "activations":
        readers = [m.path for m in group.consumers]
        found = hear(model, readers, batches, seed=seed) if batches else {}
        heard = {path: all_rows(rows) for path, rows in found.items()}
    evidence = gather(
        model, graph, group, moments={}, sensitivity=None, feel=False, ties=ties, signals=heard,
        seed=seed,
    )  # fmt: skip
    if features == "activations":
        blocks = [c.signals.T for c in evidence.consumers if c.signals is not None]
        if not blocks:
            raise RepairError(
                "there are no activations to compare units by.",
                where=f"group '{group.name}', features='activations'",
                fix="pass calibration batches, or choose features='producers'.",
            )
    else:
        blocks = _written(evidence) + _carried(model, graph, group, ties)
        read = evidence.consumers if features == "group" else ()
        blocks += [c.weight.transpose(0, 1).flatten(1) for c in read]
    return torch.cat([_sized(block) for block in blocks], dim=1)


def _written(evidence: Evidence) -> list[Tensor]:
    """List what writes the units; biases count, or a shifted unit would be a copy."""
    found = [torch.cat([f.weight.flatten(1), f.offset], dim=1) for f in evidence.filters]
    return found or [evidence.producers]


def _carried(model: nn.Module, graph: Graph, group: Group, ties: frozenset[str]) -> list[Tensor]:
    """List what layers on the way do to each unit, but for norms that are folded in."""
    done = {norm_behind(model, graph, m.path, ties) for m in group.producers}
    modules = dict(model.named_modules())
    through = [m for m in group.members if m.side == "through" and m.path in modules]
    return [block for m in through if m.path not in done for block in _along(modules[m.path], m)]


def _along(module: nn.Module, member: Member) -> list[Tensor]:
    if isinstance(module, BatchNorm) and module.running_var is not None:
        return [part[member.index] for part in gain_and_shift(module)]
    found = [(tensor(module, n).double().cpu(), axis) for n, axis in axes(module, "through")]
    return [t.movedim(axis, 0)[member.index].flatten(1) for t, axis in found]


def _sized(block: Tensor) -> Tensor:
    return block / block.square().mean().sqrt().clamp_min(1e-300)
