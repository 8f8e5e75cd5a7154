"""Tensors laid side by side."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from torch_otprune.structure.coupling.fields import compact, core, spread, varying
from torch_otprune.structure.coupling.forest import KEPT
from torch_otprune.structure.coupling.ledger import Ledger
from torch_otprune.structure.coupling.rules import Named, place

__all__ = ["cat"]


def cat(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Labels side by side; a part without any stays."""
    parts = [t for t in given["tensors"] if t.numel()]
    axis = (given["dim"] or 0) % out.dim()
    new = op.overloadpacket.__name__ == "stack"
    slots: list[tuple[set[int], list[tuple[int, Tensor]]]] = []
    for number, tensor in enumerate(parts):
        fact = ledger.fact(tensor)
        if fact.source == "filler" and not (new or fact.fields):
            place(slots, (number, _free(ledger, tensor, axis)), apart={axis})
        for field in fact.fields:
            place(slots, (number, field.unsqueeze(axis) if new else field), apart={axis})
    shapes = [p.unsqueeze(axis).shape if new else p.shape for p in parts]
    free = {n for n, t in enumerate(parts) if ledger.fact(t).source == "filler"}
    fields = [_abreast(ledger, members, shapes, axis, free) for _, members in slots]
    ledger.put(out, fields, ledger.source(parts))


def _free(ledger: Ledger, tensor: Tensor, axis: int) -> Tensor:
    """Label a constant made in forward, as a first hidden state: it may follow what joins it."""
    shape = [-1 if a == axis else 1 for a in range(tensor.dim())]
    return spread(ledger.forest.grow(tensor.shape[axis]).view(shape), tensor.shape)


def _abreast(
    ledger: Ledger,
    members: list[tuple[int, Tensor]],
    shapes: list[torch.Size],
    axis: int,
    free: Collection[int],
) -> Tensor:
    """Write the labels of one slot beside one another; what runs along all parts is one."""
    # constants made in forward, which are free, may follow along the other axes
    each = [[f for n, f in members if n == number] for number in range(len(shapes))]
    lines = [_united(ledger, fields, s) for fields, s in zip(each, shapes, strict=True)]
    if any(axis in varying(line) for line in lines):
        return torch.cat(lines, axis)
    told = [core(line) for n, line in enumerate(lines) if each[n] or n not in free]
    narrow = torch.broadcast_tensors(*told)
    for line in narrow[1:]:
        ledger.join(narrow[0], line)
    shape = list(shapes[0])
    shape[axis] = sum(s[axis] for s in shapes)
    return spread(torch.stack(narrow).amax(0), shape)


def _united(ledger: Ledger, fields: list[Tensor], shape: torch.Size) -> Tensor:
    """Make one field of several; one of labels that stay where there is none."""
    if not fields:
        return compact(torch.full([1] * len(shape), KEPT, device="cpu").expand(shape))
    for field in fields[1:]:
        ledger.join(*torch.broadcast_tensors(core(fields[0]), core(field)))
    return compact(torch.broadcast_tensors(*(core(f) for f in fields))[0].expand(shape))
