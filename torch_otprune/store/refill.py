"""Old values into a living model: the modules it should have, their tensors in the same objects."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch_otprune.store.files import Way
from torch_otprune.store.fill import arranged
from torch_otprune.surgery.lineage import give_

__all__ = ["refill_", "retree_"]


def retree_(chosen: Mapping[str, nn.Module]) -> None:
    """Let every module hold those that belong into it, in their order.

    Args:
        chosen: path to module, outer before inner.
    """
    inside: dict[str, dict[str, nn.Module]] = {}
    for path, module in chosen.items():
        owner, _, name = path.rpartition(".")
        if path:
            inside.setdefault(owner, {})[name] = module
    for path, module in chosen.items():
        table = module._modules
        empty = {name: None for name, held in table.items() if held is None}
        table.clear()
        table.update({**inside.get(path, {}), **empty})


def refill_(
    chosen: Mapping[str, nn.Module], way: Way, values: Mapping[str, Tensor], device: torch.device
) -> None:
    """Put every tensor where it was; a parameter that is there stays the same object.

    Args:
        chosen: path to module of the dense model.
        way: the page.
        values: stored name to what was read.
        device: for what has no place yet.
    """
    names: dict[str, list[str]] = {}
    for name in [*values, *way.aliases]:
        names.setdefault(way.aliases.get(name, name), []).append(name)
    taken: set[int] = set()
    for stored, own in names.items():
        value = values[stored]
        value = torch.view_as_complex(value) if stored in way.pairs else value
        value = arranged(value, way.strides.get(stored))
        there = [_held(chosen, name) for name in own]
        known = next((t for t in there if t is not None and id(t) not in taken), None)
        new = _in_place(known, value, device, learns=stored in way.parameters)
        taken.add(id(new))
        for name in own:
            _put_(chosen, name, new)
    _drop_others_(chosen, {name for own in names.values() for name in own})


def _held(chosen: Mapping[str, nn.Module], name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    owner = chosen[path]
    return owner._parameters.get(leaf, owner._buffers.get(leaf))


def _in_place(known: Tensor | None, value: Tensor, device: torch.device, *, learns: bool) -> Tensor:
    """Write a value into the tensor that is there, and make one where there is none."""
    is_parameter = isinstance(known, nn.Parameter)
    if known is None or known.is_meta or is_parameter != learns:
        home = device if known is None or known.is_meta else known.device
        new = value.to(home)
        return nn.Parameter(new, requires_grad=False) if learns else new
    if (known.shape, known.dtype, known.stride()) == (value.shape, value.dtype, value.stride()):
        known.detach().copy_(value)
    elif is_parameter:
        give_(known, value.to(known.device))
    else:
        return value.to(known.device)
    return known


def _put_(chosen: Mapping[str, nn.Module], name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = chosen[path]
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value


def _drop_others_(chosen: Mapping[str, nn.Module], names: set[str]) -> None:
    """Empty the places that the dense model does not fill."""
    for path, module in chosen.items():
        for table in (module._parameters, module._buffers):
            for leaf in table:
                if f"{path}.{leaf}".strip(".") not in names:
                    table[leaf] = None
