"""Ops that read or write places named by numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_otprune.structure.coupling.fields import compact, core, spread, varying
from torch_otprune.structure.coupling.ledger import Ledger
from torch_otprune.structure.coupling.rules import Named, flat, unknown

__all__ = ["embedding", "lookup", "pack", "scatter", "unpack"]


def embedding(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Rows of a table, looked up by number."""
    weight, fields, made = given["weight"], [], next(flat(out))
    for field in ledger.fact(weight).fields:
        if varying(field) == (1,):
            ledger.play(weight, core(field), "out")
            fields.append(spread(core(field).flatten(), made.shape))
        else:
            ledger.object(core(field), "mix", "their rows are looked up by number")
    ledger.put(made, fields)


def lookup(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Places of a tensor, named by another one: what varies along other axes is carried."""
    x = given["self"]
    indices = given["indices"] if given["indices"] is not None else given["index"]
    tables = list(indices) if isinstance(indices, (tuple, list)) else None
    axis = (given["dim"] or 0) % max(x.dim(), 1)
    axes = [a for a, t in enumerate(tables) if t is not None] if tables else [axis]
    if tables:  # a mask of several axes takes several
        axes = sorted(
            {
                a + k
                for a, t in enumerate(tables)
                if t is not None
                for k in range(t.dim() if t.dtype in (torch.bool, torch.uint8) else 1)
            }
        )
    fields = []
    for field in ledger.fact(x).fields:
        said = "they are picked by a table of numbers"
        rest = ledger.without(field, axes, "mix", said)
        if rest is not None and out.device.type == "meta":  # nobody knows which places are meant
            unknown(ledger, op, given, out)
            return
        if rest is not None:
            fields.append(_picked(op, rest, given))
    # rows of a parameter, as of an expert's weights, are still the parameter's
    taken = [x] if ledger.fact(x).source == "static" else [x, *flat(indices)]
    ledger.put(out, fields, ledger.source(taken))


def _picked(op: Any, field: Tensor, given: Named) -> Tensor:
    others = _on_cpu({k: v for k, v in given.items() if k != "self"})
    picked: Tensor = op(field, **others)
    if picked.numel() or not field.numel():
        return picked
    # no row, as of an expert that no token asked for: labelled as one row would be
    one: Tensor = op(field, **_one(others))
    return spread(core(compact(one)), picked.shape)


def _one(tree: Any) -> Any:
    """Let what picks nothing pick the first place."""
    if isinstance(tree, Tensor) and tree.dtype == torch.bool and not tree.any():
        mask = torch.zeros_like(tree).flatten()
        mask[:1] = True
        return mask.view(tree.shape)
    if isinstance(tree, Tensor) and not tree.numel():
        return tree.new_zeros([max(size, 1) for size in tree.shape])
    if isinstance(tree, dict):
        return {key: _one(value) for key, value in tree.items()}
    return [_one(v) for v in tree] if isinstance(tree, (tuple, list)) else tree


def _on_cpu(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return [_on_cpu(v) for v in tree] if isinstance(tree, (tuple, list)) else tree


def scatter(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Numbers written or added at places along one axis of another tensor."""
    x = given["self"]
    source = next((given[n] for n in ("source", "src", "values") if given[n] is not None), None)
    indices = given["indices"]
    axis = (given["dim"] or 0) % max(out.dim(), 1)
    axes = [a for a, t in enumerate(indices) if t is not None] if indices else [axis]
    told = []
    for tensor in (t for t in (x, source) if isinstance(t, Tensor)):
        shift = out.dim() - tensor.dim()
        for field in ledger.fact(tensor).fields:
            said = "they are written to places named by numbers"
            here = [a - shift for a in axes if a >= shift] if tensor is not x else axes
            rest = ledger.without(field, here, "mix", said)
            if rest is None and tensor is x:
                rest = field  # they cannot go one by one, but groups of them may
            if rest is not None:
                kept = core(rest)
                if all(
                    n in (1, m)
                    for n, m in zip(reversed(kept.shape), reversed(out.shape), strict=False)
                ):
                    told.append(spread(kept, out.shape))
    slots = [told[0]] if told else []
    for field in told[1:]:
        ledger.join(*torch.broadcast_tensors(core(slots[0]), core(field)))
    ledger.put(out, slots, ledger.source([t for t in (x, source) if isinstance(t, Tensor)]))


def pack(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Texts of several lengths, laid end to end: steps become rows, features stay the last axis."""
    _laid(ledger, given["input"], (0, 1), next(flat(out)))


def unpack(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """The same back again; what fills up short texts is nobody's."""
    _laid(ledger, given["data"], (0,), next(flat(out)))


def _laid(ledger: Ledger, x: Tensor, axes: tuple[int, ...], made: Tensor) -> None:
    """Carry what varies along the features; steps and texts are places."""
    fields = []
    for field in ledger.fact(x).fields:
        rest = ledger.without(field, axes, "mix", "their positions are mixed")
        if rest is not None:
            kept = core(rest)[tuple(0 for _ in axes)]
            fields.append(spread(kept, made.shape))
    ledger.put(made, fields, ledger.fact(x).source)
