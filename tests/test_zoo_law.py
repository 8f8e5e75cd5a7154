"""On nets that torch-pruning gets right, our units are its groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from tests.zoo import vision
from tests.zoo.oracle import Case
from torch_otprune.structure import Group
from torch_otprune.structure.layers import is_linear

torch_pruning = pytest.importorskip("torch_pruning")

NETS = (
    "vgg resnet resnet_bottleneck resnet_preactivated densenet mobilenet_v1 mobilenet_v2 "
    "squeezenet inception csp_darknet segmentation"
).split()

Place = tuple[str, str, int]


def ours(case: Case, group: Group, unit: int) -> set[Place]:
    """List the channels of convolutions and dense layers that go with a unit."""
    return {
        (m.path, m.side, channel)
        for m in group.members
        if is_linear(case.model.get_submodule(m.path))
        for channel in m.index[unit].tolist()
    }


def theirs(case: Case, graph: Any, group: Group, unit: int) -> set[Place]:
    """List what torch-pruning removes when it is asked to remove the unit."""
    names = {module: name for name, module in case.model.named_modules()}
    root = group.producers[0]
    module = case.model.get_submodule(root.path)
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    prune = getattr(torch_pruning, f"prune_{kind}_out_channels")
    found = graph.get_pruning_group(module, prune, idxs=root.index[unit].tolist())
    return set(_places(graph, found, names))


def _places(graph: Any, found: Any, names: dict[nn.Module, str]) -> Iterator[Place]:
    for dependency, indices in found:
        module = dependency.target.module
        if module in names and is_linear(module):
            out = graph.is_out_channel_pruning_fn(dependency.handler)
            yield from ((names[module], "out" if out else "in", i) for i in indices)


@pytest.mark.parametrize("name", NETS)
def test_units_are_the_groups_of_torch_pruning(name: str) -> None:
    case = Case(vision.ENTRIES[name])
    graph = torch_pruning.DependencyGraph().build_dependency(case.model, case.example)
    groups = case.graph.groups
    assert groups
    for group in groups:
        for unit in (0, group.units - 1):
            assert ours(case, group, unit) == theirs(case, graph, group, unit), group.name
