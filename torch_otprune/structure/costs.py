"""What a width costs: parameters and MACs as exact polynomials in the kept widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from torch_otprune.structure.graph import CostModel, Dim, Group, Side, Term
from torch_otprune.structure.layers import (
    Conv,
    axes,
    axis_of,
    bare,
    channels,
    is_depthwise,
    is_linear,
    kernel,
    tensor,
)
from torch_otprune.structure.probe import Probe

__all__ = ["cost_models"]


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
    return {
        "params": CostModel("params", tuple(params)),
        "macs": CostModel("macs", tuple(macs)),
    }


class _Widths:
    """The axis polynomial of every tensor axis that some group cuts."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.sides: dict[tuple[str, Side], dict[str, int]] = defaultdict(dict)
        self.axes: dict[tuple[str, int], Dim] = {}
        modules = dict(model.named_modules())
        for group in groups:
            for member in group.members:
                self.sides[member.path, member.side][group.name] = member.index.shape[1]
        units = {group.name: group.units for group in groups}
        for (path, side), by_group in self.sides.items():
            if path in modules:
                self._note(path, modules[path], side, by_group, units)
            else:
                self._note_parameter(model, path, by_group, units)

    def _note(
        self,
        path: str,
        module: nn.Module,
        side: Side,
        by_group: dict[str, int],
        units: dict[str, int],
    ) -> None:
        share = _share(module, side)
        dim = _dim((channels(module, side) or 0) // share, by_group, units, share)
        for name, axis in axes(module, side):
            self.axes[f"{path}.{name}", axis] = dim

    def _note_parameter(
        self, model: nn.Module, path: str, by_group: dict[str, int], units: dict[str, int]
    ) -> None:
        name, parameter = bare(path)[0], dict(model.named_parameters()).get(bare(path)[0])
        if parameter is None:
            return  # a buffer costs nothing
        shape = parameter.shape
        axis = axis_of(path, shape)
        self.axes[name, axis] = _dim(shape[axis], by_group, units, 1)


def _share(module: nn.Module, side: Side) -> int:
    """A grouped convolution holds only a share of its input channels per filter."""
    if isinstance(module, Conv) and not is_depthwise(module) and side == "in":
        return module.groups
    return 1


def _dim(size: int, by_group: dict[str, int], units: dict[str, int], share: int) -> Dim:
    each = tuple(sorted((name, width // share) for name, width in by_group.items()))
    return Dim(size - sum(width * units[name] for name, width in each), each)


def _size_term(name: str, shape: Sequence[int], widths: _Widths) -> Term:
    dims = tuple(widths.axes.get((name, axis), Dim(size)) for axis, size in enumerate(shape))
    return Term(name, 1, dims)


def _mac_term(name: str, module: nn.Module, positions: int, widths: _Widths) -> Term:
    if is_depthwise(module):
        out = widths.axes.get((f"{name}.weight", 0), Dim(channels(module, "out") or 0))
        return Term(name, positions * kernel(module), (out,))
    assert is_linear(module)
    shape = tensor(module, "weight").shape
    dims = [widths.axes.get((f"{name}.weight", axis), Dim(shape[axis])) for axis in (0, 1)]
    return Term(name, positions * kernel(module), tuple(dims))
