"""Nearest neighbours of very many points: random trees propose, true distances decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.transport.checks import at_least_one, cloud, refuse
from torch_otprune.transport.sliced import directions

__all__ = ["Neighbours", "nearest"]

DIMS = 8  # of a tree: in more, the cells are all empty
BITS = 7  # cuts of every axis: 8 axes of 7 bits name a cell in one whole number
BLOCK = 256  # points whose candidates are priced together
STILL = 0.002  # of the neighbours: when a round finds fewer new ones, it was the last
FEW = 20_000  # points below which all distances are as fast


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For every point some others, nearest first.

    Args:
        index: which; never the point itself.
        distance: to them, in the unit of the points.
        exact: whether all distances were looked at.
    """

    index: Int[Tensor, "n k"]
    distance: Float[Tensor, "n k"]
    exact: bool


def nearest(
    points: Float[Tensor, "n d"],
    count: int,
    *,
    method: Literal["auto", "exact", "trees"] = "auto",
    trees: int = 8,
    rounds: int = 3,
    seed: int = 0,
) -> Neighbours:
    """Find the nearest neighbours of every point without a table of all distances.

    Each tree cuts random directions into ever smaller cells, as Flowtree does: along its leaves,
    what shares small cells lies together, and the nearest along the line are candidates. Then
    neighbours of neighbours are, for some rounds. True distances rank them.

    Args:
        points: one row each, at least two.
        count: neighbours wanted; at most n - 1.
        method: `exact` compares all pairs block by block, `trees` does not unless half of all
            points are wanted; `auto` takes trees above 20 000 points.
        trees: how many; more find more.
        rounds: of neighbours of neighbours.
        seed: of the trees.

    Returns:
        indices and distances; memory is linear in n, time with trees too.

    Raises:
        TransportError: if a point is not finite, there is one alone, or the count or the trees
            are none.

    Source: Backurs et al. 2020 for the trees of cells whose matches are priced by true distances;
    Dong et al. 2011 for neighbours of neighbours.

    Limits: where points fill many dimensions evenly, trees miss most neighbours of very many
    points; those they find instead are a few per cent further away.
    """
    points = cloud(points, "points").detach()
    at_least_one(count, "count")
    at_least_one(trees, "trees")
    n = len(points)
    refuse(
        n < 2,
        "a single point has no neighbour.",
        where="nearest, argument points",
        fix="pass at least two points.",
    )
    count = min(count, n - 1)
    few = n <= 2 * count  # a stretch of leaves would be all of them
    middle = points - points.mean(0)  # what all share would cancel digits of products
    unit = float(middle.abs().max()) or 1.0  # squares of any other size leave single precision
    middle = middle / unit
    if few or method == "exact" or (method == "auto" and n <= FEW):
        near, far = _every(middle, count)
        return Neighbours(near, far * unit, exact=True)
    found = _trees(middle, count, trees, seed)
    for turn in range(rounds):
        found, moved = _around(middle, found, seed + turn)
        if moved < STILL:
            break
    every = torch.arange(n, device=points.device).split(BLOCK)
    priced = [_priced(middle, part, found[0][part]) for part in every]
    near, squared = (torch.cat([pair[side] for pair in priced]) for side in (0, 1))
    return Neighbours(near, squared.sqrt() * unit, exact=False)


def _every(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compare all pairs, some rows at a time."""
    power = points.square().sum(1)
    places, far = [], []
    step = max(1, 2**24 // len(points))
    for part in torch.arange(len(points), device=points.device).split(step):
        squared = power[part, None] + power - 2 * (points[part] @ points.T)
        squared[torch.arange(len(part), device=part.device), part] = torch.inf
        best = squared.topk(min(count + 8, len(points) - 1), dim=1, largest=False).indices
        near, squared = _priced(points, part, best)
        places.append(near[:, :count])
        far.append(squared[:, :count].sqrt())
    return torch.cat(places), torch.cat(far)


def _priced(points: Tensor, rows: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Sort candidates by their true squared distance; equals go by number."""
    other = other.sort(dim=1).values
    squared = (points[other] - points[rows, None]).square().sum(2)
    order = squared.argsort(dim=1, stable=True)
    return other.gather(1, order), squared.gather(1, order)


def _trees(points: Tensor, count: int, trees: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keep the best along the leaves of every tree."""
    n = len(points)
    index = torch.full((n, count), -1, dtype=torch.int64, device=points.device)
    squared = points.new_full((n, count), torch.inf)
    window = torch.arange(-count, count + 1, device=points.device)
    window = window[window != 0]
    for tree in range(trees):
        line = _line(points, seed * 1009 + tree)
        place = torch.empty_like(line)
        place[line] = torch.arange(n, device=points.device)
        for part in torch.arange(n, device=points.device).split(BLOCK):
            other = line[(place[part, None] + window) % n]
            index[part], squared[part] = _best(points, part, index[part], squared[part], other)
    return index, squared


def _line(points: Tensor, seed: int) -> Int[Tensor, " n"]:
    """Order points by the leaves of one tree: cells cut at the middle of randomly turned axes."""
    d = points.shape[1]
    turned = directions(d, d, seed=seed)[:, : min(DIMS, d)].to(points)
    low = (points @ turned).double()
    low = low - low.amin(0)
    side = 2 * float(low.max()) or 1.0
    generator = torch.Generator("cpu").manual_seed(seed)
    shift = torch.rand(low.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    cell = ((low + shift.to(low) * side / 2) / side * 2 ** (BITS + 1)).long()
    name = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for bit in range(BITS, -1, -1):
        for axis in range(low.shape[1]) if bit else range(min(low.shape[1], 6)):
            name = name * 2 + ((cell[:, axis] >> bit) & 1)
    return name.argsort(stable=True)


def _best(
    points: Tensor, rows: Tensor, index: Tensor, squared: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge candidates into what was found, each once."""
    other = other.sort(dim=1).values  # the same name twice must not crowd others out
    there, here = points[other], points[rows]
    fresh = torch.baddbmm(there.square().sum(2)[:, :, None], there, here[:, :, None], alpha=-2)
    fresh = (fresh[:, :, 0] + here.square().sum(1, keepdim=True)).clamp_min_(0)
    fresh.masked_fill_(other == rows[:, None], torch.inf)
    fresh[:, 1:].masked_fill_(other[:, 1:] == other[:, :-1], torch.inf)
    # What was found already may be among them, so that twice as many are looked at.
    most = min(2 * index.shape[1], fresh.shape[1])
    fresh, chosen = fresh.topk(most, dim=1, largest=False, sorted=False)
    both, names = torch.cat([squared, fresh], 1), torch.cat([index, other.gather(1, chosen)], 1)
    names, order = names.sort(dim=1, stable=True)
    both = both.gather(1, order)
    both[:, 1:].masked_fill_(names[:, 1:] == names[:, :-1], torch.inf)
    top = both.topk(index.shape[1], dim=1, largest=False, sorted=True)
    return names.gather(1, top.indices), top.values


def _around(
    points: Tensor, found: tuple[Tensor, Tensor], seed: int
) -> tuple[tuple[Tensor, Tensor], float]:
    """Look at the neighbours of neighbours, and at who has a point for a neighbour."""
    index, squared = found
    n, count = index.shape
    back = _back(index, seed)
    linked = torch.cat([index, back], 1)
    new_index, new_squared, moved = index.clone(), squared.clone(), 0
    for part in torch.arange(n, device=points.device).split(BLOCK):
        near = linked[index[part, : max(count // 2, 1)]].flatten(1)
        other = torch.cat([near, back[part]], 1)
        best = _best(points, part, index[part], squared[part], other)
        moved += int((best[1] < squared[part]).sum())
        new_index[part], new_squared[part] = best
    return (new_index, new_squared), moved / (n * count)


def _back(index: Tensor, seed: int) -> Int[Tensor, "n some"]:
    """List a few of those that name a point as their neighbour; the point itself fills gaps."""
    n, count = index.shape
    some = max(count // 2, 1)
    generator = torch.Generator("cpu").manual_seed(seed)
    mix = torch.randperm(n * count, generator=generator, device="cpu").to(index.device)
    to, source = index.flatten()[mix], mix // count
    order = to.argsort(stable=True)
    to, source = to[order], source[order]
    first = torch.searchsorted(to, torch.arange(n, device=index.device))
    rank = torch.arange(len(to), device=index.device) - first[to]
    keep = rank < some
    back = torch.arange(n, device=index.device)[:, None].repeat(1, some)
    back[to[keep], rank[keep]] = source[keep]
    return back
