"""What a width costs: parameters and MACs as exact polynomials in the kept widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from torch_otprune.structure.graph import CostModel, Dim, Group, Side, Term
from torch_otprune.structure.layers import (
    Conv,
    axes,
    axis_of,
    bare,
    channels,
    holder,
    is_depthwise,
    is_linear,
    kernel,
    tensor,
)
from torch_otprune.structure.probe import Probe
from torch_otprune.structure.routing import numbered

__all__ = ["cost_models", "uncounted"]


def cost_models(model: nn.Module, groups: Sequence[Group], notes: Probe) -> dict[str, CostModel]:
    """Write both costs as polynomials in the groups' kept widths.

    Args:
        model: the dense model.
        groups: what can be cut.
        notes: how often and on how many positions each layer ran.

    Returns:
        `params` (unique elements of parameters) and `macs` (multiply-accumulates per sample,
        biases and norms not counted).
    """
    widths = _Widths(model, groups)
    macs = [
        _mac_term(name, module, notes.positions[name], widths)
        for name, module in model.named_modules()
        if name in notes.positions
    ] + [Term(name, own, ()) for name, own in notes.macs.items()]
    params = [_size_term(name, p.shape, widths) for name, p in model.named_parameters()]
    params += _gone(model, groups, params)
    macs += _gone(model, groups, macs)
    return {
        "params": CostModel("params", tuple(params)),
        "macs": CostModel("macs", tuple(macs)),
    }


def uncounted(model: nn.Module, groups: Iterable[Group]) -> tuple[str, ...]:
    """Say whose products no MACs are counted of: matrices that are no layer of their own.

    Args:
        model: the dense model.
        groups: what can be cut.

    Returns:
        one sentence, or none.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    found = {
        holder(m.path, modules)
        for m in (m for group in groups for m in group.members if m.side in ("in", "out"))
        if (leaf := parameters.get(bare(m.path)[0])) is not None and leaf.dim() > 1
    }
    if not found:
        return ()
    names = sorted(found)
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")
    return (f"MACs leave out the products inside {shown}; parameters count them",)


def _gone(model: nn.Module, groups: Sequence[Group], terms: Sequence[Term]) -> list[Term]:
    """Take off what listed experts cost, all alike, for each that goes.

    Exact as long as not both experts and widths of single ones are cut. Where experts share the
    tokens among them, the others take over what one did: that costs what it did.

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
    whole = _computed(name)
    dims = tuple(
        widths.axes.get((whole, axis), Dim(size)) if size > 1 or whole == name else Dim(size)
        for axis, size in enumerate(shape)
    )
    return Term(name, 1, dims)


def _computed(name: str) -> str:
    """Name the tensor that a parametrisation computes from a parameter; else the parameter."""
    *owner, last = name.split("parametrizations.")
    return f"{owner[0]}{last.partition('.')[0]}" if owner else name


def _mac_term(name: str, module: nn.Module, positions: int, widths: _Widths) -> Term:
    if is_depthwise(module):
        out = widths.axes.get((f"{name}.weight", 0), Dim(channels(module, "out") or 0))
        return Term(name, positions * kernel(module), (out,))
    assert is_linear(module)
    shape = tensor(module, "weight").shape
    dims = [widths.axes.get((f"{name}.weight", axis), Dim(shape[axis])) for axis in (0, 1)]
    return Term(name, positions * kernel(module), tuple(dims))
