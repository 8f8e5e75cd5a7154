"""Which activations to make linear together, so that all of them disappear inside folds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch_otprune.fold.chains import Layer, runs
from torch_otprune.fold.linear import TOKEN_NORMS
from torch_otprune.fold.pieces import Gate, Piece, cheapest, prefixes, standing_apart
from torch_otprune.structure.layers import BatchNorm

__all__ = ["Option", "Row", "best_sets", "inner", "objection", "rows"]


@dataclass(frozen=True)
class Row:
    """Layers that would be affine without the activations between them.

    Args:
        layers: in order of execution, as they will be once they take up a line.
        gaps: the activations behind each layer but the last.
    """

    layers: tuple[Layer, ...]
    gaps: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Option:
    """Some activations that may go together.

    Args:
        score: what losing them costs, by the criterion.
        cost: of the layers that are left, in the unit of the gate.
        names: the activations.
    """

    score: float = 0.0
    cost: int = 0
    names: tuple[str, ...] = ()

    def joined(self, other: Option) -> Option:
        """Let both go."""
        return Option(self.score + other.score, self.cost + other.cost, self.names + other.names)

    @property
    def key(self) -> tuple[float, int, tuple[str, ...]]:
        """Order options: by score but for rounding, then by what they save, then by name."""
        return float(f"{self.score:.9e}"), self.cost, self.names


def rows(
    chain: tuple[Layer, ...], linear: Collection[str], shifting: Collection[str]
) -> Iterator[Row]:
    """Cut a chain at the activations that stay.

    Args:
        chain: layers in order of execution.
        linear: paths of the activations that may go.
        shifting: those among them whose line shifts.

    Yields:
        rows of two layers or more.
    """
    for run in runs(chain, linear):
        places = [i for i, x in enumerate(run) if x.geometry is not None]
        between = (run[i + 1 : j] for i, j in pairwise(places))
        gaps = tuple(tuple(x.path for x in gap) for gap in between)
        layers = (run[i] for i in places)
        shift = (any(path in shifting for path in gap) for gap in (*gaps, ()))
        if gaps:
            yield Row(tuple(map(_lined, layers, shift)), gaps)


def _lined(layer: Layer, shift: bool) -> Layer:
    """Describe a layer as it will be once it has taken up a line."""
    if not shift or layer.geometry is None:
        return layer
    return replace(layer, geometry=replace(layer.geometry, bias=True, shifts=True))


def best_sets(
    found: Iterable[Row],
    prices: Mapping[str, float],
    held: Collection[str],
    *,
    gate: Gate,
    interior: bool,
) -> tuple[dict[int, Option], set[str]]:
    """Find the best set of every size in which each activation lies inside a fold.

    Args:
        found: rows.
        prices: activation to score, for those that may go.
        held: activations that are gone already and must stay inside folds; any other that
            `prices` does not name may be anywhere.
        gate: what a fold must not raise.
        interior: whether a fold may be wrong near the border.

    Returns:
        size to set, 0 included, and all activations that can go in some set.

    Source: dynamic programming over the kept activations of each row, then over rows; the
    two-stage programme of Kim et al. 2023 with "the cheapest folding removes them all" in place
    of a latency table.
    """
    total, usable = {0: Option()}, set[str]()
    for row in found:
        own, names = _row_sets(row, prices, held, gate=gate, interior=interior)
        usable |= names
        whole: dict[int, Option] = {}
        for a in total.values():
            for b in own.values():
                _offer(whole, a.joined(b))
        total = whole
    return dict(sorted(total.items())), usable


def _offer(table: dict[int, Option], option: Option) -> None:
    size = len(option.names)
    if size not in table or option.key < table[size].key:
        table[size] = option


def _row_sets(
    row: Row, prices: Mapping[str, float], held: Collection[str], *, gate: Gate, interior: bool
) -> tuple[dict[int, Option], set[str]]:
    """Split a row at some of its activations; in each part, all others must fold away."""
    end, usable = len(row.layers), set[str]()
    bends = {i + 1: gap for i, gap in enumerate(row.gaps) if _bound(gap, prices, held)}
    cuts = [0, *(at for at, gap in bends.items() if not set(gap) & set(held)), end]
    best: list[dict[int, Option]] = [{0: Option()}, *({} for _ in range(end))]
    for begin in cuts[:-1]:
        parts = prefixes(row.layers[begin:], gate, interior=interior)
        for stop in (cut for cut in cuts if cut > begin):
            pieces = parts[stop - begin]
            inside = {at for at in bends if begin < at < stop}
            if not inside <= _inner(begin, pieces):
                continue
            names = tuple(n for at in sorted(inside) for n in bends[at] if n in prices)
            usable.update(names)
            part = Option(sum(prices[n] for n in names), sum(p.cost(gate) for p in pieces), names)
            for before in best[begin].values():
                _offer(best[stop], before.joined(part))
    return best[end], usable


def _bound(gap: Iterable[str], prices: Mapping[str, float], held: Collection[str]) -> bool:
    return any(path in prices or path in held for path in gap)


def _inner(begin: int, pieces: Sequence[Piece]) -> set[int]:
    """List the places where one layer of a row is folded with the one in front of it."""
    found, first = set[int](), begin
    for piece in pieces:
        found |= {first + place for place in inner(piece.layers)}
        first += len(piece.layers)
    return found


def inner(layers: Sequence[Layer]) -> set[int]:
    """List the places inside a fold that its end makes shorter.

    A norm that only moves from the layer in front to the layer behind saves nothing.

    Args:
        layers: what folds.

    Returns:
        places between two layers that are no norms: 1 is between the first two.
    """
    solid = [i for i, x in enumerate(layers) if not isinstance(x.module, (BatchNorm, *TOKEN_NORMS))]
    return set(range(solid[0] + 1, solid[-1] + 1)) if solid else set()


def objection(row: Row, name: str, *, gate: Gate, interior: bool) -> str:
    """Say why an activation would not disappear inside a fold if it alone went.

    Args:
        row: where it is.
        name: the activation.
        gate: what a fold must not raise.
        interior: whether a fold may be wrong near the border.

    Returns:
        one clause, with both numbers where the gate is in the way.
    """
    place = next(i for i, gap in enumerate(row.gaps) if name in gap)
    bends = [i for i, gap in enumerate(row.gaps) if gap]
    first = max((i + 1 for i in bends if i < place), default=0)
    last = min((i + 1 for i in bends if i > place), default=len(row.layers))
    before, behind = row.layers[first : place + 1], row.layers[place + 1 : last]
    front = cheapest(before, gate, interior=interior)[-1]
    back = cheapest(behind, gate, interior=interior)[0]
    return standing_apart(front, back, gate, interior=interior)[1]
