"""How every shelf is held to the promise: cut random units, compare with the masked model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import Entry
from torch_otprune.plan import Cut
from torch_otprune.plan.slices import slices
from torch_otprune.structure import Graph, Group, trace
from torch_otprune.structure.forward import map_tensors
from torch_otprune.surgery import compared

__all__ = ["RATIOS", "Case", "alive", "differences", "doubled", "random_cut"]

RATIOS = (0.1, 0.3, 0.5, 0.8)


def doubled(batch: Any) -> Any:
    """Write a batch in float64."""
    return map_tensors(batch, lambda t: t.double() if t.is_floating_point() else t)


@torch.no_grad()
def alive(model: nn.Module) -> nn.Module:
    """Move every norm and bias away from where initialisation puts them: nothing is zero or one."""
    generator = torch.Generator().manual_seed(5)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    for tensor in model.parameters():
        if tensor.dim() < 2:
            tensor.add_(noise(tensor) * 0.3)
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor.add_(noise(tensor))
        elif name.endswith("running_var"):
            tensor.add_(noise(tensor).abs())
    return model


class Case:
    """An entry, built and analysed once.

    Args:
        entry: of the zoo.
    """

    def __init__(self, entry: Entry) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = alive(entry.build().double().eval())
            self.example = doubled(entry.example())
        self.graph: Graph = trace(self.model, self.example)

    def compared(self, groups: list[Group], ratio: float) -> tuple[float, str]:
        """Cut random units of some groups."""
        generator = torch.Generator().manual_seed(round(100 * ratio))
        cuts = [random_cut(group, ratio, generator) for group in groups]
        return compared(self.model, cuts, self.example)


@cache
def case_of(entry: Entry) -> Case:
    """Build an entry, once for all tests."""
    return Case(entry)


def random_cut(group: Group, ratio: float, generator: torch.Generator) -> Cut:
    """Keep random units, one at least."""
    size = max(1, round(group.units * (1 - ratio)))
    keep = torch.randperm(group.units, generator=generator)[:size].sort().values
    return Cut(
        group=group.name,
        rule=0,
        units=group.units,
        keep=tuple(keep.tolist()),
        criterion="random",
        error=0.0,
        reason="random units",
        slices=slices(group, keep),
    )


def differences(case: Case, groups: list[Group]) -> Iterator[tuple[str, float, str]]:
    """Cut kind by kind, then all at once, at every ratio.

    Yields:
        what was cut, how far it is from the masked model, and what the trial says.
    """
    kinds = {
        kind: [g for g in groups if g.kind == kind] for kind in ("channels", "heads", "hidden")
    }
    sets = {kind: found for kind, found in kinds.items() if found}
    if len(sets) > 1:
        sets["all"] = groups
    for ratio in RATIOS:
        for kind, some in sets.items():
            far, said = case.compared(some, ratio)
            yield f"{kind} at {ratio}", far, said
