"""Layers that the example does not reach: nothing is known of them, and nothing is tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torch_otprune.structure.forward import evaluating, run
from torch_otprune.structure.graph import Graph
from torch_otprune.structure.layers import bare

__all__ = ["unreached"]

_NAMED = 3


def unreached(model: nn.Module, graph: Graph, example: Any) -> Iterator[str]:
    """Say which layers a plan knows nothing of, as another batch may reach them.

    Costs a forward pass where there are layers that the analysis does not name.

    Args:
        model: the dense model.
        graph: its analysis.
        example: the batch that it was analysed on.

    Yields:
        one clause, if there are any.
    """
    named = set(_named(graph))
    some = {
        path: module
        for path, module in model.named_modules()
        if path not in named and any(True for _ in module.parameters(recurse=False))
    }
    idle = _idle(model, some, example) if some else []
    if idle:
        more = f" and {len(idle) - _NAMED} more" if len(idle) > _NAMED else ""
        listed = ", ".join(map(repr, idle[:_NAMED])) + more
        yield (
            f"the first samples do not reach {listed}: the plan holds for the way that they take, "
            "and data that go another way may not fit the smaller model; put samples that reach "
            "them first, or pass them as example="
        )


def _named(graph: Graph) -> Iterator[str]:
    yield from graph.order
    members = [m.path for group in graph.groups for m in group.members]
    for path in (*members, *(path for b in graph.blocked for path in b.modules)):
        leaf = bare(path)[0]
        yield leaf
        yield leaf.rpartition(".")[0]


class _Seen:
    """A hook that notes that its module ran."""

    def __init__(self, left: dict[str, nn.Module], path: str) -> None:
        self.left, self.path = left, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.left.pop(self.path, None)


def _idle(model: nn.Module, some: dict[str, nn.Module], example: Any) -> list[str]:
    left = dict(some)
    handles = [m.register_forward_pre_hook(_Seen(left, path)) for path, m in some.items()]
    try:
        with evaluating(model), torch.no_grad():
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in some if path in left]
