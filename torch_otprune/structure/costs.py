"""What a width costs: parameters and MACs as exact polynomials in the kept widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from torch_otprune.structure.coupling import Component
from torch_otprune.structure.forward import batch_size, map_tensors
from torch_otprune.structure.graph import CostModel, Dim, Graph, Group, Side, Term
from torch_otprune.structure.layers import (
    Conv,
    axes,
    axis_of,
    bare,
    channels,
    is_depthwise,
)
from torch_otprune.structure.routing import numbered
from torch_otprune.structure.tally import Tally, tallied

__all__ = ["beside", "computed", "cost_models", "uncounted", "unsteady"]

_MOST = 64  # samples that MACs are counted on where they depend on the data
_APART = 0.01  # share by which they may differ without a word


def cost_models(
    model: nn.Module, groups: Sequence[Group], found: Sequence[Component], tally: Tally
) -> dict[str, CostModel]:
    """Write both costs as polynomials in the groups' kept widths.

    Args:
        model: the dense model.
        groups: what can be cut.
        found: the coupled sets that the groups were made of.
        tally: what a run of the model multiplied.

    Returns:
        `params` (unique elements of parameters) and `macs` (multiply-accumulates per sample of
        all products of matrices as the example ran them; biases, norms and what works number by
        number are not counted).
    """
    widths = _Widths(model, groups)
    params = [_size_term(name, p.shape, widths) for name, p in model.named_parameters()]
    params += _gone(model, groups, params)
    macs = [*tally.terms(_whose(groups, found, tally), [(g.name, g.units) for g in groups])]
    macs += _gone(model, [g for g in groups if not _shared(model, g, tally)], macs)
    return {
        "params": CostModel("params", tuple(params)),
        "macs": CostModel("macs", tuple(macs), tuple(sorted(tally.left_out)), open=tally.open),
    }


def uncounted(cost: CostModel) -> tuple[str, ...]:
    """Say what no MACs are counted of: ops that multiply inside and do not say how.

    Args:
        cost: of the model.

    Returns:
        one sentence, or none.
    """
    if not cost.left_out:
        return ()
    shown = ", ".join(map(repr, cost.left_out[:3]))
    more = f" and {len(cost.left_out) - 3} more ops" if cost.left_out[3:] else ""
    return (f"MACs leave out the products inside of {shown}{more}",)


def beside(model: nn.Module, graph: Graph, batch: Any, example: Any) -> Graph:
    """Count MACs on more samples than the example's, where the data may decide how many they are.

    That is where an op of the example's run has a shape that its values decide: a mask, a router,
    lengths. Elsewhere nothing runs. Samples run by as many as the example has, so that what a
    batch shares is shared alike, and no more memory is needed than for the example.

    Args:
        model: the dense model; it is left as it was.
        graph: its analysis.
        batch: further samples.
        example: what the analysis ran on.

    Returns:
        the analysis, with what was counted in its costs.
    """
    cost, size, each = graph.costs["macs"], batch_size(batch), batch_size(example)
    pieces = range(0, min(size, _MOST) - each + 1, each)
    if not cost.open or len(pieces) < 2:
        return graph
    rows = (partial(_rows, start=start, stop=start + each, size=size) for start in pieces)
    runs = [tallied(model, map_tensors(batch, some)).plain for some in rows]
    mean = {key: sum(run[key] for run in runs) / len(runs) for run in runs for key in run}
    total, first = sum(mean.values()), tallied(model, example).plain
    apart = sum(abs(macs - first[key]) for key, macs in mean.items()) / max(total, 1)
    found = replace(cost, beside=(each * len(runs), int(total / each), apart))
    return replace(graph, costs={**graph.costs, "macs": found})


def _rows(tensor: Tensor, *, start: int, stop: int, size: int) -> Tensor:
    return tensor[start:stop] if tensor.dim() and len(tensor) == size else tensor


def unsteady(graph: Graph) -> tuple[str, ...]:
    """Say where MACs on further samples are others than on the example.

    Args:
        graph: an analysis that `beside` saw.

    Returns:
        one sentence, or none.
    """
    cost = graph.costs["macs"]
    if not cost.beside or cost.beside[2] <= _APART:
        return ()
    samples, macs, apart = cost.beside
    counted = cost.at(graph.full())
    said = f"{macs:,} per sample"
    if abs(macs - counted) <= _APART * counted:
        said = f"{apart / 2:.0%} of them in other layers"
    return (
        f"MACs depend on the data here: {counted:,} per sample on the first samples, which the "
        f"plan counts; {said} on {samples} that calibration kept; a MAC budget holds for the "
        "former",
    )


def _whose(
    groups: Sequence[Group], found: Sequence[Component], tally: Tally
) -> npt.NDArray[np.int64]:
    """Find the group of every label that names a set of coupled channels."""
    whose = np.full(len(tally.roots), -1)
    known = defaultdict[str, list[tuple[Side, Component]]](list)
    for component in found:
        for path, side in component.sides:
            known[path].append((side, component))
    # where experts lie in one table, their rows are units of a group of its own: that one wins
    for number, group in sorted(enumerate(groups), key=lambda each: each[1].kind != "experts"):
        for member in group.members:
            unit = np.zeros(member.size, dtype=bool)
            unit[member.index.numpy()] = True
            for side, component in known[member.path]:
                if member.side in (side, "expert"):
                    first = component.sides[member.path, side][:, 0].numpy()
                    whose[component.roots[unit[first]]] = number
    return whose


def _shared(model: nn.Module, group: Group, tally: Tally) -> bool:
    """Tell whether listed experts share the tokens: the others take over what one did."""
    if not group.least:
        return False
    known = dict(model.named_modules())
    lists = [m.path for m in group.members if m.side == "expert" and m.path in known]
    router = next(bare(m.path)[0] for m in group.members if m.side == "out")
    tokens = tally.rows[router if router in known else router.rpartition(".")[0]]
    firsts = (
        next((rows for at, rows in tally.rows.items() if at.startswith(f"{path}.{name}.")), 0)
        for path in lists
        for name in known[path]._modules
    )
    return any(rows < tokens for rows in firsts)


def _gone(model: nn.Module, groups: Sequence[Group], terms: Sequence[Term]) -> list[Term]:
    """Take off what listed experts cost, all alike, for each that goes.

    Exact as long as not both experts and widths of single ones are cut.

    Returns:
        terms to add, negative ones.
    """
    modules, found = dict(model.named_modules()), list[Term]()
    for group in groups:
        for path in (m.path for m in group.members if m.side == "expert"):
            prefix = numbered(modules.get(path))
            if prefix is None:
                continue
            heads = [f"{path}.{prefix}{i}." for i in range(len(modules[path]._modules))]
            each = [[t for t in terms if f"{t.owner}.".startswith(head)] for head in heads]
            if all([t.scale for t in one] == [t.scale for t in each[0]] for one in each):
                width = len(each) // group.units
                left = Dim(len(each), ((group.name, -width),))
                found += [replace(t, scale=-t.scale, dims=(left, *t.dims)) for t in each[0]]
    return found


class _Widths:
    """The axis polynomial of every tensor axis that some group cuts."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.sides: dict[tuple[str, Side], dict[str, int]] = defaultdict(dict)
        self.axes: dict[tuple[str, int], Dim] = {}
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for group in groups:
            for member in group.members:
                self.sides[member.path, member.side][group.name] = member.index.shape[1]
        units = {group.name: group.units for group in groups}
        for (path, side), by_group in self.sides.items():
            if path in modules:
                self._note(path, modules[path], side, by_group, units)
            else:
                self._note_parameter(parameters, path, by_group, units)

    def _note(
        self,
        path: str,
        module: nn.Module,
        side: Side,
        by_group: dict[str, int],
        units: dict[str, int],
    ) -> None:
        for name, axis in axes(module, side):
            share = _share(module, side) if name == "weight" else 1
            dim = _dim((channels(module, side) or 0) // share, by_group, units, share)
            self.axes[f"{path}.{name}", axis] = dim

    def _note_parameter(
        self,
        parameters: Mapping[str, Tensor],
        path: str,
        by_group: dict[str, int],
        units: dict[str, int],
    ) -> None:
        name, parameter = bare(path)[0], parameters.get(bare(path)[0])
        if parameter is None:
            return  # a buffer costs nothing
        shape = parameter.shape
        axis = axis_of(path, shape)
        self.axes[name, axis] = _dim(shape[axis], by_group, units, 1)


def _share(module: nn.Module, side: Side) -> int:
    """A grouped convolution holds only a share of its channels along one side of its weight."""
    if isinstance(module, Conv) and not is_depthwise(module):
        return module.groups if (side == "out") == module.transposed else 1
    return 1


def _dim(size: int, by_group: dict[str, int], units: dict[str, int], share: int) -> Dim:
    each = tuple(sorted((name, width // share) for name, width in by_group.items()))
    return Dim(size - sum(width * units[name] for name, width in each), each)


def _size_term(name: str, shape: Sequence[int], widths: _Widths) -> Term:
    whole = computed(name)
    dims = tuple(
        widths.axes.get((whole, axis), Dim(size)) if size > 1 or whole == name else Dim(size)
        for axis, size in enumerate(shape)
    )
    return Term(name, 1, dims)


def computed(name: str) -> str:
    """Name the tensor that a parametrisation computes from a parameter; else the parameter.

    Args:
        name: of a parameter.

    Returns:
        a name under which the tensor is read.
    """
    *owner, last = name.split("parametrizations.")
    return f"{owner[0]}{last.partition('.')[0]}" if owner else name
