"""Ops that take numbers along some axes together: pools, norms, means, softmaxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_otprune.structure.coupling.fields import compact, core, spread, varying
from torch_otprune.structure.coupling.ledger import Ledger
from torch_otprune.structure.coupling.rules import Named, Rule, flat, meet

__all__ = ["batch_norm", "chooses", "grid", "group_norm", "mixes", "norm", "routes"]


def mixes(kind: str, said: str, *axes_of: str) -> Rule:
    """Make the rule of an op that mixes numbers along some axes and keeps the others apart."""

    def rule(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
        x = next(flat(given))
        asked = next((given[name] for name in axes_of if given[name] is not None), None)
        if isinstance(asked, int):
            asked = [asked]
        axes = [a % x.dim() for a in asked] if asked else list(range(x.dim()))
        for made in flat(out):
            carried(ledger, x, axes, made, (kind, said))

    return rule


def routes(said: str) -> Rule:
    """Make the rule of a softmax: what competes along its axis is carried on all the same."""

    def rule(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
        x, made = next(flat(given)), next(flat(out))
        axis, fields = given["dim"] % x.dim(), []
        for field in ledger.fact(x).fields:
            if varying(field) == (axis,):
                ledger.object(core(field), "route", said)
                fields.append(field)
            elif (rest := ledger.without(field, [axis], "route", said)) is not None:
                fields.append(rest)
        ledger.put(made, fields, ledger.fact(x).source)

    return rule


def chooses(said: str) -> Rule:
    """Make the rule of an op that picks some of the numbers along an axis by comparing them."""

    def rule(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
        x, dim = next(flat(given)), given["dim"]
        last = op.overloadpacket.__name__ in ("topk", "sort")
        axes = [dim % x.dim()] if isinstance(dim, int) else list(range(x.dim()))
        axes = axes[-1:] if last else axes
        for field in ledger.fact(x).fields:
            if set(varying(field)) <= set(axes):
                count = given["k"] if isinstance(given["k"], int) else 1
                ledger.chosen.append((core(field).flatten(), count))
        for made in flat(out):
            carried(ledger, x, axes, made, ("route", said))

    return rule


def grid(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """A pool or an upsampling mixes positions and keeps channels apart."""
    x = next(flat(given))
    spatial = _SPATIAL[next(n for n in _SPATIAL if n in op.overloadpacket.__name__)]
    axes = list(range(x.dim() - spatial, x.dim()))
    for made in flat(out):
        carried(ledger, x, axes, made, ("mix", "their positions are mixed"))


_SPATIAL = {"1d": 1, "2d": 2, "3d": 3, "linear": 1}


def carried(
    ledger: Ledger, x: Tensor, axes: Sequence[int], out: Tensor, why: tuple[str, str]
) -> None:
    """Carry labels over an op that mixes some axes, keeps their number or removes them."""
    fields = []
    for field in ledger.fact(x).fields:
        rest = ledger.without(field, axes, *why)
        if rest is None:
            continue
        kept = core(rest)
        if out.dim() != x.dim():
            kept = kept[tuple(0 if a in axes else slice(None) for a in range(x.dim()))]
        fields.append(spread(kept, out.shape))
    ledger.put(out, fields, ledger.fact(x).source)


def norm(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """A layer-norm takes all numbers along its axes together, and scales each."""
    x, made = given["input"], next(flat(out))
    axes = list(range(x.dim() - len(given["normalized_shape"]), x.dim()))
    fields = []
    for field in ledger.fact(x).fields:
        vary = set(varying(field))
        if vary <= set(axes):
            ledger.object(core(field), "norm", "a norm takes all of them together")
            fields.append(field)
        elif (rest := ledger.without(field, axes, "norm", "")) is not None:
            fields.append(rest)
    ledger.put(made, fields, ledger.fact(x).source)
    scales = [t for t in (given["weight"], given["bias"]) if t is not None]
    if scales:
        meet(ledger, [made, *scales], made)


def batch_norm(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """A batch-norm in evaluation mode scales and shifts every channel by its own numbers."""
    x, made = given["input"], next(flat(out))
    shape = [1] * x.dim()
    shape[1] = -1
    fields = ledger.fact(x).fields
    if given["training"]:  # as in a standardised weight
        over, said = [0, *range(2, x.dim())], "a norm takes all of them together"
        kept = (ledger.without(field, over, "mix", said) for field in fields)
        fields = tuple(field for field in kept if field is not None)
    ledger.put(made, fields, ledger.fact(x).source)
    names = ("weight", "bias", "running_mean", "running_var")
    for tensor in (given[n] for n in names if given[n] is not None):
        view = tensor.view(shape)
        ledger.put(view, [f.view(shape) for f in ledger.fact(tensor).fields], "static")
        meet(ledger, [made, view], made)


def group_norm(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """A group-norm takes the channels of a group together."""
    x, made, groups = given["input"], next(flat(out)), given["group"]
    fields = []
    for field in ledger.fact(x).fields:
        rest = ledger.without(field, [0, *range(2, x.dim())], "mix", "their positions are mixed")
        if rest is None:
            continue
        labels = core(rest).flatten()
        if groups == 1:
            ledger.object(labels, "norm", "a norm takes all of them together")
        else:
            rows = ledger.tie(compact(labels.view(groups, -1)), [1])
            labels = rows.reshape(-1)
        fields.append(spread(labels.view([-1 if a == 1 else 1 for a in range(x.dim())]), x.shape))
    ledger.put(made, fields, ledger.fact(x).source)
    shape = [-1 if a == 1 else 1 for a in range(x.dim())]
    for tensor in (given[n] for n in ("weight", "bias") if given[n] is not None):
        view = tensor.view(shape)
        ledger.put(view, [f.view(shape) for f in ledger.fact(tensor).fields], "static")
        meet(ledger, [made, view], made)
