"""A product of three: two inputs and a weight for every pair of their channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_otprune.structure.coupling.contract import contract
from torch_otprune.structure.coupling.fields import core, varying
from torch_otprune.structure.coupling.ledger import Ledger
from torch_otprune.structure.coupling.rules import meet, unknown

__all__ = ["grouped", "trilinear"]


def trilinear(ledger: Ledger, op: Any, given: Any, out: Tensor) -> None:
    """Carry labels over a product of three tensors, summed over some axes.

    Args:
        ledger: where labels are joined.
        op: the op.
        given: its arguments by name.
        out: what it returned.
    """
    summed = set(given["sumdim"])
    wide = []
    for number in (1, 2, 3):
        tensor, view = given[f"i{number}"], given[f"i{number}"]
        fields = list(ledger.fact(tensor).fields)
        for axis in sorted(given[f"expand{number}"]):
            view = view.unsqueeze(axis)
            fields = [field.unsqueeze(axis) for field in fields]
        for field in fields:
            role = "in" if set(varying(field)) & summed else "out"
            ledger.play(tensor, core(field), role)  # type: ignore[arg-type]
        wide.append(view.new_empty(view.shape, device="meta"))
        ledger.put(wide[-1], fields)
    shape = [max(sizes) for sizes in zip(*(t.shape for t in wide), strict=True)]
    product = wide[0].new_empty(shape)
    meet(ledger, wide, product)
    left = [a for a in range(product.dim()) if a not in summed]
    told = []
    for field in ledger.fact(product).fields:
        if set(varying(field)) - summed:
            rest = ledger.tie(field, [a for a in varying(field) if a in summed])
            told.append(rest[tuple(slice(None) if a in left else 0 for a in range(rest.dim()))])
    ledger.put(out, told)


def grouped(ledger: Ledger, op: Any, given: Any, out: Tensor) -> None:
    """Carry labels over a product of runs of rows, each with a matrix of its own.

    So are experts computed: rows of tokens, sorted by expert, times that expert's weights.

    Args:
        ledger: where labels are joined.
        op: the op.
        given: its arguments by name.
        out: what it returned.
    """
    rows, matrices = given["self"], given["mat2"]
    if (rows.dim(), matrices.dim()) != (2, 3):
        unknown(ledger, op, given, out)
        return
    fields = []
    for field in ledger.fact(matrices).fields:
        rest = ledger.without(field, [0], "mix", "they are picked by a table of numbers")
        if rest is not None:
            fields.append(rest[0])
    one = matrices.new_empty(matrices.shape[1:], device="meta")
    ledger.put(one, fields, ledger.fact(matrices).source)
    contract(ledger, (rows, one), "mk,kn->mn", out)
