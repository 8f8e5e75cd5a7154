"""Which blocks go together: remove one, see how the others stand now, remove the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush
from math import isfinite

__all__ = ["Look", "look_ahead", "rising"]


class Look(ABC):
    """What is left of the network's output after blocks went and the rest was mended."""

    @abstractmethod
    def __call__(self, gone: Collection[int]) -> float:
        """Try it within one chain.

        Args:
            gone: numbers of the blocks that go.

        Returns:
            squared change of the output as a share of its power, on samples held out; NaN where
            it cannot be tried.
        """

    @abstractmethod
    def among(self, gone: Collection[str]) -> float:
        """Try it across chains.

        Args:
            gone: names of the blocks that go.

        Returns:
            the same.
        """


def look_ahead(
    look: Look, names: Sequence[str], *, count: int, trials: int
) -> list[tuple[str, float]] | None:
    """Let blocks go one by one, each time the one that adds least to those that went before.

    What a block added at an earlier look is taken as the least that it adds later: only blocks
    that are ahead by that are looked at again. Once the trials are used up, what is known
    decides.

    Args:
        look: tries a set of blocks.
        names: all blocks, in order of execution.
        count: how many go for certain; the order of the others is what is known by then.
        trials: most sets that are tried; each block alone is always tried.

    Returns:
        every block and what it adds, the first to go first; None where a block alone cannot be
        tried.

    Source: lazy evaluation as in Minoux 1978, for costs that grow with what is gone.
    """
    alone = [look.among([name]) for name in names]
    if not all(map(isfinite, alone)):
        return None
    # what it adds, so that of equal ones the last goes; and how many were gone at that look
    heap = [(added, back, 0) for back, added in zip(range(0, -len(names), -1), alone, strict=True)]
    heapify(heap)
    gone: list[tuple[str, float]] = []
    spent, left = 0.0, trials - len(names)
    while heap:
        added, back, known = heappop(heap)
        name = names[-back]
        fresh = known == len(gone) or not gone
        if not fresh and left > 0 and len(gone) < count:
            left -= 1
            total = look.among([*(other for other, _ in gone), name])
            more = total - spent if isfinite(total) else added
            heappush(heap, (more, back, len(gone)))
            continue
        gone.append((name, added))
        spent += added
    return gone


def rising(steps: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Price blocks so that none goes before its turn.

    Args:
        steps: every block and what it adds, the first to go first.

    Returns:
        block to price. One that is cheap only because others went costs a little more than the
        dearest of them.
    """
    prices: dict[str, float] = {}
    least = 0.0
    for name, added in steps:
        prices[name] = max(added, least)
        least = prices[name] * (1 + 1e-6) or 1e-12
    return prices
