"""What each kind of op does to labels; every rule reads (ledger, args, output)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_otprune.structure.coupling.contract import contract, own
from torch_otprune.structure.coupling.fields import compact, core, spread, varying
from torch_otprune.structure.coupling.ledger import Fact, Ledger
from torch_otprune.structure.coupling.moves import alone, held

__all__ = [
    "Named",
    "Rule",
    "attention",
    "filler",
    "flat",
    "glu",
    "keep",
    "matrix",
    "meet",
    "move",
    "pad",
    "place",
    "pointwise",
    "sequence",
    "tensors",
    "unknown",
]


class Named(dict[str, Any]):
    """An op's arguments by the names of its schema; absent ones are None."""

    def __missing__(self, key: str) -> None:
        return None


Rule = Callable[[Ledger, Any, Named, Any], None]


def flat(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors among an op's arguments or outputs."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from flat(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from flat(value)


def tensors(given: Named) -> list[Tensor]:
    """List the tensors among an op's arguments; most are there as they are."""
    found: list[Tensor] = []
    for value in given.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list, Mapping)):
            found += flat(value)
    return found


def pointwise(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Numbers at one place of all operands belong together."""
    operands = [t for t in tensors(given) if t.numel() != 1 or t.dim()]
    for made in flat(out):
        if len(operands) == 1 and _alone(ledger, operands[0], made):
            continue
        meet(ledger, operands, made)


def _alone(ledger: Ledger, operand: Tensor, out: Tensor) -> bool:
    """Carry one field, or none, as it is: a single operand of the same shape meets nobody."""
    fact = ledger.fact(operand)
    plain = len(fact.fields) <= 1 and out.shape == operand.shape
    if plain:
        source = ledger.source([operand]) if fact.source == "table" else ledger.computed([operand])
        ledger.put(out, fact.fields, source)
    return plain


def meet(ledger: Ledger, operands: Sequence[Tensor], out: Tensor, *, role: str = "through") -> None:
    """Join the fields of operands that are broadcast against one another."""
    shape, facts = out.shape, [ledger.fact(t) for t in operands]
    slots: list[tuple[set[int], list[tuple[int, Tensor]]]] = []
    for number, fact in enumerate(facts):
        for field in fact.fields:
            wide = spread(field, shape)
            place(slots, (number, wide))
    told = []
    for axes, members in slots:
        told.append(_merge(ledger, operands, shape, axes, members))
        for number, wide in members:
            if len(operands) > 1 or role != "through":
                ledger.play(operands[number], core(wide), role)  # type: ignore[arg-type]
    # what comes of tables alone, like a frozen norm's scale, is a table
    alike = role == "keep" or {ledger.fact(t).source for t in operands} == {"table"}
    source = ledger.source(operands) if alike else ledger.computed(operands)
    ledger.put(out, [f for f in told if f is not None], source)


def place(
    slots: list[tuple[set[int], list[tuple[int, Tensor]]]],
    item: tuple[int, Tensor],
    *,
    apart: Collection[int] = (),
) -> None:
    """Put a field to those that vary along an axis of its own; `apart` counts only by itself."""
    axes, members = set(varying(item[1])), [item]
    axes = axes - set(apart) or axes
    for slot in [s for s in slots if s[0] & axes]:
        slots.remove(slot)
        axes |= slot[0]
        members = slot[1] + members
    slots.append((axes, members))


def _merge(
    ledger: Ledger,
    operands: Sequence[Tensor],
    shape: torch.Size,
    axes: set[int],
    members: list[tuple[int, Tensor]],
) -> Tensor | None:
    """Join what meets in one slot; where an operand does not follow along an axis, tie it."""
    stiff: set[int] = set()
    for number, operand in enumerate(operands):
        if ledger.fact(operand).source == "filler":
            continue
        follows = {a for n, f in members if n == number for a in varying(f)}
        if ledger.fact(operand).source == "table" and follows < axes:
            members[:] = [(n, f) for n, f in members if n != number]
            follows = set()  # a table of angles or positions has no say in heads
        shift = len(shape) - operand.dim()
        full = {a for a in axes if a >= shift and own(operand, a - shift)}
        stiff |= full - follows
    fields = [field for _, field in members]
    if any(len(varying(field)) > 1 for field in fields):  # copies fit heads and dimensions alike
        fields = [f for f in fields if len(varying(f)) > 1 or not ledger.copied(f)]
    if stiff:
        said = "they meet a tensor that does not follow"
        fields = [
            f
            for f in (ledger.without(f, sorted(stiff), "fixed", said) for f in fields)
            if f is not None
        ]
    if not fields:
        return None
    result = fields[0]
    for field in fields[1:]:
        small = torch.broadcast_tensors(core(result), core(field))
        ledger.join(*small)
        result = spread(ledger.forest.roots(torch.maximum(*small)), shape)
    for operand in operands:
        _adopt(ledger, operand, result)
    return result


def _adopt(ledger: Ledger, operand: Tensor, field: Tensor) -> None:
    """Let a constant follow what it met first: whoever meets it next goes with that."""
    fact = ledger.fact(operand)
    if fact.source != "filler":
        return
    kept = core(field)
    while kept.dim() > operand.dim() and kept.shape[0] == 1:
        kept = kept[0]
    fits = kept.dim() == operand.dim() and all(
        n in (1, m) for n, m in zip(kept.shape, operand.shape, strict=True)
    )
    if fits:
        mine = compact(kept.expand(operand.shape))
        others = [f for f in fact.fields if not set(varying(f)) & set(varying(mine))]
        ledger.note(operand, Fact((*others, mine), "filler"))


def move(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """The numbers stay what they are and change places: carry the op out on the labels."""
    (_, x), *others = given.items()
    if op.overloadpacket.__name__.startswith("as_strided"):
        others.append(("like", x))
    made, fact = list(flat(out)), ledger.fact(x)
    fields: list[list[Tensor]] = [[] for _ in made]
    for field in fact.fields:
        tied = held(ledger, op, field, given)
        moved = list(flat(_moved(op, tied, dict(others))))
        if fact.source == "data" and not fact.even:
            alone(ledger, op, tied, zip(made, moved, strict=True))
        for told, label in zip(fields, moved, strict=True):
            told.append(label)
    if op.overloadpacket.__name__ == "expand" and fact.source == "data":
        fields[0] += _repeats(ledger, x, made[0])
    for tensor, told in zip(made, fields, strict=True):
        # a weight of several matrices is laid flat only to be one operand: both of its axes stay
        kept = _apart(ledger, told) if fact.source == "data" else told
        ledger.put(tensor, kept, fact.source)


def _repeats(ledger: Ledger, x: Tensor, out: Tensor) -> list[Tensor]:
    """Label the copies along the axes that an expansion wrote several times, but for the first."""
    shift = out.dim() - x.dim()
    grown = [a for a in range(max(shift, 1), out.dim()) if x.shape[a - shift] < out.shape[a]]
    return [ledger.copies(out.shape, a) for a in grown]


def _apart(ledger: Ledger, fields: list[Tensor]) -> list[Tensor]:
    """Decide where heads and their dimensions, both labelled, became one axis: heads go."""
    if len(fields) < _SEVERAL:
        return fields
    kept: list[Tensor] = []
    order = sorted((compact(f) for f in fields), key=lambda f: (ledger.copied(f), _changes(f)))
    for field in order:
        if any(set(varying(field)) & set(varying(other)) for other in kept):
            ledger.object(core(field), "mix", "every head reads them")
        else:
            kept.append(field)
    return kept


_SEVERAL = 2


def _changes(field: Tensor) -> int:
    """Count how often neighbours differ: more for what runs inside of something else."""
    flat_field = core(field).flatten()
    return int((flat_field[1:] != flat_field[:-1]).sum())


_COPIES = {"view": "reshape", "_unsafe_view": "reshape", "_reshape_alias": "reshape"}


def _moved(op: Any, field: Tensor, others: dict[str, Any]) -> Any:
    name = op.overloadpacket.__name__
    if name.startswith("as_strided"):
        return _restrided(op, field, others)
    if name in _COPIES:
        return field.reshape(next(iter(others.values())))
    if name.endswith("channel_shuffle"):
        return field.unflatten(1, (others["groups"], -1)).transpose(1, 2).flatten(1, 2)
    return op(field, **others)


def _restrided(op: Any, field: Tensor, others: dict[str, Any]) -> Tensor:
    """Lay the labels out in memory as the numbers are, and read them as the op does."""
    like = others.pop("like")
    if list(others["size"]) == list(field.shape):  # the strides of a pooled picture
        return field
    laid = torch.empty_strided(like.shape, like.stride(), dtype=field.dtype, device="cpu")
    offset = others.pop("storage_offset", None)
    away = (like.storage_offset() if offset is None else offset) - like.storage_offset()
    read: Tensor = op(laid.copy_(field), **others, storage_offset=away)
    return read


def keep(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """The output has the labels of the first operand: a copy, a cast, zeros like it."""
    x = next(flat(given))
    for made in flat(out):
        fields = ledger.fact(x).fields if made.shape == x.shape else ()
        ledger.put(made, fields, ledger.fact(x).source)


def pad(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Zeros beside a tensor stay; along axes where nothing varies they are as all others."""
    x, widths = given["self"], list(given["pad"] or given["padding"])
    fields = []
    for field in ledger.fact(x).fields:
        kept = core(field) + 1
        asked = [0] * (2 * x.dim())
        asked[: len(widths)] = widths
        for axis, size in enumerate(kept.shape):
            if size == 1:
                place = 2 * (x.dim() - 1 - axis)
                asked[place : place + 2] = [0, 0]
        shifted = torch.nn.functional.pad(kept, asked) - 1
        fields.append(spread(shifted, out.shape))
    ledger.put(out, fields, ledger.fact(x).source)


def matrix(spec: str) -> Rule:
    """Make the rule of a matrix product."""

    def rule(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
        *bias, a, b = list(flat(given))
        contract(ledger, (a, b), spec, out)
        for tensor in bias:
            meet(ledger, [out, tensor], out, role="out")

    return rule


def attention(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Scores from queries and keys, then a mean of values: two products over each head."""
    q, made = given["query"], next(flat(out))
    k, v = (_repeated(ledger, given[name], q.shape[1]) for name in ("key", "value"))
    shape = (*q.shape[:-1], k.shape[-2])
    scores = q.new_empty(shape, device="meta")
    contract(ledger, (q, k), "bhsd,bhtd->bhst", scores)
    mask = given["attn_mask"] if given["attn_mask"] is not None else given["attn_bias"]
    if mask is not None:
        meet(ledger, [scores, mask], scores)
    contract(ledger, (scores, v), "bhst,bhtd->bhsd", made)


def _repeated(ledger: Ledger, x: Tensor, heads: int) -> Tensor:
    """Write keys or values of grouped queries once for every query head."""
    times = heads // x.shape[1]
    if times == 1:
        return x
    wide = x.new_empty((x.shape[0], heads, *x.shape[2:]), device="meta")
    fields = [f.repeat_interleave(times, 1) for f in ledger.fact(x).fields]
    if x.shape[1] == 1:
        fields.append(ledger.copies(wide.shape, 1))
    ledger.put(wide, fields, ledger.fact(x).source)
    return wide


def filler(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """A constant made in forward: it may follow, as the trial will show."""
    for made in flat(out):
        ledger.put(made, (), "filler")


def sequence(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Numbers made from nothing but a size: they do not follow."""
    for made in flat(out):
        ledger.put(made, (), "made")


def patches(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """Windows of a picture, one column each: a channel's label on each of its taps."""
    x, fields = given["self"], []
    for field in ledger.fact(x).fields:
        rest = ledger.without(field, [x.dim() - 2, x.dim() - 1], "mix", "their positions are mixed")
        if rest is None:
            continue
        taps = out.shape[-2] // x.shape[-3]
        kept = core(rest).squeeze(-1)
        kept = kept.repeat_interleave(taps, -2) if kept.shape[-2] > 1 else kept
        fields.append(spread(kept, out.shape))
    ledger.put(out, fields, ledger.fact(x).source)


def glu(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """One half gates the other."""
    x = given["self"]
    axis = given["dim"] if given["dim"] is not None else -1
    halves = x.chunk(2, axis)
    for half, place in zip(halves, (0, 1), strict=True):
        fields = [f.chunk(2, axis)[place] for f in ledger.fact(x).fields]
        ledger.put(half, fields, ledger.fact(x).source)
    meet(ledger, halves, out)


def unknown(ledger: Ledger, op: Any, given: Named, out: Any) -> None:
    """No rule: nothing that gets here can go."""
    operands = list(flat(given))
    empty = any(not tensor.numel() for tensor in operands)
    said = "no row of the example reaches this op" if empty else "this op may mix channels"
    for tensor in operands:
        for field in ledger.fact(tensor).fields:
            ledger.object(core(field), "unknown", said)
    for made in flat(out):
        ledger.put(made, ())
