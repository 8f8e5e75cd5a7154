"""Labels on numbers: the joins are those of a plain union-find, the moves those of the numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_otprune.structure import trace
from torch_otprune.structure.coupling import components
from torch_otprune.structure.coupling.fields import compact, core, varying
from torch_otprune.structure.coupling.forest import KEPT, Forest
from torch_otprune.structure.coupling.ledger import Fact, Ledger


def partition(pairs: list[tuple[int, int]], count: int) -> set[frozenset[int]]:
    """Join one pair after the other, by hand."""
    sets = [{i} for i in range(count)]
    for a, b in pairs:
        first, second = (next(s for s in sets if i in s) for i in (a, b))
        if first is not second:
            sets.remove(second)
            first |= second
    return {frozenset(s) for s in sets}


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=30))
def test_joining_whole_arrays_is_joining_pair_by_pair(pairs: list[tuple[int, int]]) -> None:
    forest = Forest()
    labels = forest.grow(12)
    if pairs:
        left, right = torch.tensor(pairs).T
        forest.union(left, right)
    roots = forest.roots(labels).tolist()
    found = {frozenset(i for i in range(12) if roots[i] == root) for root in roots}
    assert found == partition(pairs, 12)


def test_a_place_that_stays_joins_nothing() -> None:
    forest = Forest()
    labels = forest.grow(3)
    forest.union(labels, torch.tensor([KEPT, 2, KEPT]))
    assert forest.roots(torch.tensor([KEPT, 0, 1, 2])).tolist()[:2] == [KEPT, 0]
    assert len(set(forest.roots(labels).tolist())) == 2


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_compacting_changes_no_label_and_stores_what_varies(
    shape: list[int], data: st.DataObject
) -> None:
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    small = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    count = int(torch.tensor(small).prod())
    field = torch.arange(count).view(small).expand(shape).contiguous()
    found = compact(field)
    assert torch.equal(found, field)
    assert set(varying(found)) == {axis for axis in axes if shape[axis] > 1}
    assert core(found).numel() == count


MOVES = {
    "flip": lambda t: t.flip(1),
    "shuffle": lambda t: t.view(2, 3, 2, 2, 2).transpose(1, 2).reshape(2, 6, 2, 2),
    "pixel shuffle": lambda t: nn.functional.pixel_shuffle(t[:, :4], 2),
    "slice": lambda t: t[:, 1::2],
    "flatten last": lambda t: t.permute(0, 2, 3, 1).flatten(1),
    "twice": lambda t: torch.cat([t, t.flip(1)], 1),
    "windows": lambda t: t.unfold(2, 1, 1).squeeze(-1),
    "strided": lambda t: t.contiguous().as_strided((2, 3, 2, 2), (24, 8, 2, 1)),
}


@pytest.mark.parametrize("name", MOVES)
def test_labels_move_as_numbers_do(name: str) -> None:
    move = MOVES[name]

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(6.0).view(6, 1, 1))  # each number is its place
            self.read = nn.LazyLinear(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(move(x + self.table).flatten(1))

    model = Moved().double()
    example = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        numbers = move(example + model.table).flatten(1)[0]
        model(example)
    joined: dict[int, set[int]] = {}
    for component in components(model, example):
        sides = {path: index.tolist() for (path, _), index in component.sides.items()}
        if "read" not in sides:
            continue  # a part that the move drops
        for units, columns in zip(sides["table"], sides["read"], strict=True):
            joined |= {column: set(units) for column in columns}
    for column, number in enumerate(numbers.tolist()):
        assert int(number) in joined[column]


def test_a_place_that_meets_one_that_stays_is_objected_to() -> None:
    ledger = Ledger([])
    labels = ledger.forest.grow(3)
    ledger.op = "add"
    ledger.join(labels, torch.tensor([KEPT, 1, KEPT]))
    ((owned, why),) = ledger.forest.objections
    assert owned.tolist() == [0, 2]
    assert why.kind == "fixed" and "they meet numbers that stay (op add" in why.said


def test_a_tensor_that_was_never_seen_is_data() -> None:
    assert Ledger([]).fact(torch.zeros(2)) == Fact()


class Chain(nn.Module):
    """As many residual layers as asked for."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.up = nn.ModuleList(nn.Linear(8, 6) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(6, 8) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.head(x)


def test_the_objects_that_the_analysis_keeps_grow_with_depth_and_no_faster() -> None:
    counts = []
    for depth in (8, 16, 32):
        found = components(Chain(depth), torch.randn(2, 4))
        counts.append(sum(index.numel() for c in found for index in c.sides.values()))
    first, second = (b - a for a, b in pairwise(counts))
    assert second == 2 * first


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 3))
def test_grouped_queries_make_one_unit_of_a_key_and_its_queries(
    groups: int, times: int, each: int
) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(5, groups * times * each)
            self.k, self.v = (nn.Linear(5, groups * each) for _ in range(2))
            self.o = nn.Linear(groups * times * each, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                f(x).unflatten(-1, (-1, each)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
            weights = (q @ k.mT / each).softmax(-1)
            return self.o((weights @ v).transpose(1, 2).flatten(2))

    graph = trace(Attention(), torch.randn(2, 3, 5))
    heads = [g for g in graph.groups if g.kind == "heads"]
    widths = [(g.units, {m.path: m.index.shape[1] for m in g.members}) for g in heads]
    if groups > 1:
        both = times * each
        assert widths == [(groups, {"q": both, "k": each, "v": each, "o": both})]
    else:  # one key for all: each query may go, the key stays
        assert widths == ([(times, {"q": each, "o": each})] if times > 1 else [])
