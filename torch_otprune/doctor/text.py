"""The diagnosis as rows and as plain text; what differs in numbers alone shares a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch_otprune.structure.doctor import Ailment

if TYPE_CHECKING:
    from torch_otprune.doctor.model import Activation, Diagnosis, Removable
    from torch_otprune.fold.segments import Segment
    from torch_otprune.structure.doctor import Finding, Ward

__all__ = ["HEADS", "diagnosis", "families", "pattern", "tables"]

Row = tuple[str, ...]
Item = TypeVar("Item")

HEADS: dict[str, Row] = {
    "groups": (
        "group",
        "count",
        "kind",
        "units",
        "params/unit",
        "MACs/unit",
        "from",
        "via",
        "to",
    ),
    "blocks": ("can go whole", "count", "", "frees params", "frees MACs", "of all MACs"),
    "stuck": ("stays whole", "count", "because", "fix"),
    "activations": ("activation", "count", "function", "channels", "can be linear", "fix"),
    "segments": ("folds into one", "count", "when", "promise", "params", "MACs"),
    "stays": ("keeps its channels", "count", "", "goes with", "because", "fix"),
}
_BETWEEN = 4  # layers of a fold that are named beside its ends
_NUMBER = re.compile(r"(?<![^.'])\d+(?![^.':#])")
_ORDINAL = re.compile(r"#\d+$")


def pattern(text: str) -> str:
    """Write a star for every part of a module path that is a number.

    Args:
        text: a path, or a sentence with paths in quotes.

    Returns:
        a target that selects the path and those like it.

    Example:
        >>> pattern("layer1.0.conv1"), pattern("it is part of 'layers.3', and 4 others")
        ('layer1.*.conv1', "it is part of 'layers.*', and 4 others")
    """
    return _NUMBER.sub("*", _ORDINAL.sub("", text))


def tables(found: Diagnosis, *, every: bool = False) -> dict[str, list[Row]]:
    """Write the diagnosis as rows.

    Args:
        found: the diagnosis.
        every: one row for each entry; otherwise entries whose names and reasons differ only in
            the numbers of their modules share a row, and `count` says how many.

    Returns:
        table to rows, under the names and columns of `HEADS`.
    """
    return {
        "groups": list(_groups(found.groups, every)),
        "blocks": list(_blocks(found, every)),
        "stuck": list(_stuck(found.stuck, every)),
        "activations": list(_activations(found.activations, every)),
        "segments": list(_segments(found.segments, every)),
        "stays": list(_stays(found.findings, every)),
    }


def diagnosis(found: Diagnosis, *, every: bool = False) -> str:
    """Write the diagnosis as plain text.

    Args:
        found: the diagnosis.
        every: as for `tables`.

    Returns:
        the totals, the groups, what can go in depth, and what stays with its reason.
    """
    rows = tables(found, every=every)
    lines = [f"{found.model}: {found.params:,} parameters, {found.macs:,} MACs per sample", ""]
    lines += [*_columns(found.totals()), *(f"note: {note}" for note in found.notes)]
    for row in rows["groups"]:
        lines += ["", f"group {row[0]}{_such(row[1])}: {row[3]} units, {row[2]}", *_coupled(row)]
    for name, members in _merged(found.ailments, lambda a: a.name, _ailing, every=every):
        first, count = members[0], str(len(members))
        lines += ["", f"kept whole {name}{_such(count)}: {_said(first.reason, members, every)}"]
        lines += [f"  modules: {', '.join(_short(first.modules, members, every))}"]
        lines += [f"  fix: {first.fix}"]
    for title in ("blocks", "stuck", "activations", "segments", "stays"):
        if rows[title]:
            shown = [HEADS[title], *rows[title]]
            lines += ["", *_columns([row[:5] for row in shown] if title == "stays" else shown)]
    return "\n".join(lines)


def _merged(
    items: Iterable[Item],
    name: Callable[[Item], str],
    key: Callable[[Item], Hashable],
    *,
    every: bool,
) -> Iterator[tuple[str, list[Item]]]:
    """Put together what differs in numbers alone, in the order of the first of each kind."""
    found: dict[Hashable, list[Item]] = {}
    for place, item in enumerate(items):
        found.setdefault(place if every else (pattern(name(item)), key(item)), []).append(item)
    for members in found.values():
        yield _alike([name(member) for member in members]), members


def _alike(names: Sequence[str]) -> str:
    """Write a star for the numbers in which names of one pattern differ."""
    if len(set(names)) == 1:
        return names[0]
    bare = [_ORDINAL.sub("", name) for name in names]
    columns = zip(*map(_NUMBER.findall, bare), strict=True)
    stars = iter([column[0] if len(set(column)) == 1 else "*" for column in columns])
    return _NUMBER.sub(lambda _: next(stars), bare[0])


def _said(text: str, members: Sequence[object], every: bool) -> str:
    """Write a sentence, its clauses that differ in numbers alone once."""
    return "; ".join(_short(text.split("; "), members, every))


def _short(parts: Sequence[str], members: Sequence[object], every: bool) -> list[str]:
    """Write paths or clauses; those of one pattern once, and how many there are."""
    if len(members) > 1:
        return list(dict.fromkeys(map(pattern, parts)))
    found = _merged(parts, str, lambda _: None, every=every)
    return [name + _such(str(len(same))) for name, same in found]


def _such(count: str) -> str:
    return f" ({count} such)" if count != "1" else ""


def _ailing(ailment: Ailment) -> Hashable:
    return (
        _clauses(ailment.reason),
        tuple(dict.fromkeys(map(pattern, ailment.modules))),
        ailment.fix,
    )


def _clauses(text: str) -> Hashable:
    return tuple(dict.fromkeys(map(pattern, text.split("; "))))


def families(
    entries: Iterable[Ward | Ailment], *, every: bool = False
) -> Iterator[tuple[str, int, Any]]:
    """Put together the groups, or what is kept whole, that differ in numbers alone.

    Args:
        entries: groups or ailments.
        every: leave each on its own.

    Yields:
        name, how many there are, and the first of them.
    """
    for name, members in _merged(entries, _named, _likeness, every=every):
        yield name, len(members), members[0]


def _named(entry: Ward | Ailment) -> str:
    return entry.name if isinstance(entry, Ailment) else entry.group


def _likeness(entry: Ward | Ailment) -> Hashable:
    if isinstance(entry, Ailment):
        return _ailing(entry)
    paths = (entry.producers, entry.carriers, entry.consumers)
    told = tuple(tuple(map(pattern, p)) for p in paths)
    counts = entry.units, entry.params_per_unit, entry.macs_per_unit
    return entry.kind, pattern(entry.protected), counts, told


def _groups(groups: Iterable[Ward], every: bool) -> Iterator[Row]:
    for name, members in _merged(groups, _named, _likeness, every=every):
        ward = members[0]
        counts = (ward.units, ward.params_per_unit, ward.macs_per_unit)
        paths = (ward.producers, ward.carriers, ward.consumers)
        short = ("\n".join(_short(p, members, every)) for p in paths)
        kind = f"{ward.kind}, protected" if ward.protected else ward.kind
        yield name, str(len(members)), kind, *(f"{n:,}" for n in counts), *short


def _blocks(found: Diagnosis, every: bool) -> Iterator[Row]:
    def key(block: Removable) -> Hashable:
        return block.kind, block.level

    for name, members in _merged(_ordered(found.blocks), lambda b: b.block, key, every=every):
        first, chains = members[0], len({block.chain for block in members})
        run = f" in {chains} run{'s' * (chains > 1)}{_span(members)}" if len(members) > 1 else ""
        if every:
            run = f": {first.place + 1} of the run from {first.chain}"
        params = [b.params.before - b.params.after for b in members]
        macs = [b.macs.before - b.macs.after for b in members]
        share = f"{sum(macs) / found.macs:.1%}" if found.macs else "-"
        kind = f"{first.level} ({first.kind})"
        yield name, f"{len(members)}{run}", kind, _range(params), _range(macs), share


def _span(blocks: Sequence[Removable]) -> str:
    """Write the numbers of a run without gaps, from the first to the last."""
    parts = [block.block.split(".") for block in blocks]
    places = [i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if len(places) != 1 or not all(path[places[0]].isdecimal() for path in parts):
        return ""
    numbers = [int(path[places[0]]) for path in parts]
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f": {numbers[0]} ... {numbers[-1]}" if whole else ""


def _ordered(blocks: Iterable[Removable]) -> list[Removable]:
    return sorted(blocks, key=lambda block: block.level)


def _stuck(stuck: Iterable[Ailment], every: bool) -> Iterator[Row]:
    def key(ailment: Ailment) -> Hashable:
        return pattern(ailment.reason), pattern(ailment.fix)

    for name, members in _merged(stuck, lambda a: a.name, key, every=every):
        said = (_said(text, members, every) for text in (members[0].reason, members[0].fix))
        yield name, str(len(members)), *said


def _activations(activations: Iterable[Activation], every: bool) -> Iterator[Row]:
    def key(site: Activation) -> Hashable:
        return site.function, site.functional, site.reason, site.fix

    for name, members in _merged(activations, lambda a: a.name, key, every=every):
        first = members[0]
        channels = _range([site.channels for site in members])
        told = f"no: {first.reason}" if first.reason else "yes"
        yield name, str(len(members)), first.function, channels, told, first.fix


def _segments(segments: Iterable[Segment], every: bool) -> Iterator[Row]:
    def key(segment: Segment) -> Hashable:
        return tuple(map(pattern, segment.activations)), segment.certificate.kind

    for name, members in _merged(segments, _spelled, key, every=every):
        promises = [segment.certificate for segment in members]
        params = [(p.params.before, p.params.after) for p in promises]
        macs = [(p.macs.before, p.macs.after) for p in promises if p.macs is not None]
        count = len(members[0].activations)
        when = f"once {count} activation{'s are' if count > 1 else ' is'} linear"
        change = (_change(params), _change(macs))
        yield name, str(len(members)), when if count else "now", promises[0].kind, *change


def _spelled(segment: Segment) -> str:
    first, *between, last = segment.layers
    if len(between) <= _BETWEEN:
        return " + ".join(segment.layers)
    return f"{first} + {between[0]} + ... + {last} ({len(segment.layers)} layers)"


def _stays(findings: Iterable[Finding], every: bool) -> Iterator[Row]:
    def key(finding: Finding) -> Hashable:
        return finding.fate, _clauses(finding.reason), frozenset(map(pattern, finding.blocks))

    def owner(finding: Finding) -> str:  # all tensors of one module together
        return finding.parameter if every else finding.parameter.rpartition(".")[0]

    stuck = (finding for finding in findings if finding.fate != "prunable")
    for module, members in _merged(stuck, owner, key, every=every):
        leaves = dict.fromkeys(member.parameter.rpartition(".")[2] for member in members)
        name = module if every else f"{module}.{'|'.join(leaves)}".lstrip(".")
        first = members[0]
        causes = _short(first.reason.split("; "), members, every)
        more = _more(len(causes) - 1) if not every else ""
        alike = len({member.blocks for member in members}) == 1
        blocks = ", ".join(first.blocks if alike else _short(first.blocks, members, every))
        told = causes[0] + more if more else "; ".join(causes)
        yield name, str(len(members)), first.fate, blocks, told, first.fix


def _more(count: int) -> str:
    return f" (and {count} more reason{'s' * (count > 1)})" if count else ""


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _change(costs: Sequence[tuple[int, int]]) -> str:
    """Sum what alike segments cost before and after."""
    if not costs:
        return "-"
    before, after = (sum(column) for column in zip(*costs, strict=True))
    return f"{before:,} -> {after:,}"


def _coupled(row: Row) -> Iterator[str]:
    for word, paths in zip(("from", "via", "to"), row[6:], strict=True):
        if paths:
            yield f"  {word + ':':6}{', '.join(paths.splitlines())}"
    yield f"  frees {row[4]} parameters and {row[5]} MACs per unit"


def _columns(rows: Sequence[Row]) -> list[str]:
    """Align all columns but the last, which may be a sentence."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    pad = [[cell.ljust(w) for cell, w in zip(row, widths, strict=False)] for row in rows]
    return ["  ".join([*cells, row[-1]]).rstrip() for cells, row in zip(pad, rows, strict=True)]
