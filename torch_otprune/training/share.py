"""How one pruning budget is divided among layers: more where little would be missed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

__all__ = ["Share", "amounts"]

Share = Literal["softmax_log", "softmax_ratio"]


def amounts(
    importance: Mapping[str, float],
    room: Mapping[str, int],
    budget: int,
    *,
    share: Share = "softmax_log",
    tau: float = 1.0,
) -> dict[str, int]:
    """Divide a number of weights among layers, and pour what does not fit into the others.

    With I the importance and R = sum(I) / I, `softmax_ratio` takes softmax(R), as published: R
    grows without bound, so a layer a few times less important than the others gets all of it.
    `softmax_log` takes softmax(log(R) / tau), which is R^(1/tau) over its sum.

    Args:
        importance: positive, by layer.
        room: how many weights each layer may lose.
        budget: how many to remove in all.
        share: the rule.
        tau: temperature of `softmax_log`.

    Returns:
        whole numbers that add up to the budget, or to all the room there is; none above its room.

    Source: Liao et al. 2023 (EGP), steps 5 and 6 of the public code; `softmax_log` is ours.

    Example:
        >>> room = {"a": 100, "b": 100, "c": 100}
        >>> amounts({"a": 1.0, "b": 2.0, "c": 2.0}, room, 100)
        {'a': 50, 'b': 25, 'c': 25}
        >>> amounts({"a": 0.1, "b": 1.0, "c": 1.0}, room, 100, share="softmax_ratio")
        {'a': 100, 'b': 0, 'c': 0}
    """
    budget, full = min(budget, sum(room.values())), dict[str, int]()
    while True:
        pool = {name: value for name, value in importance.items() if name not in full}
        rest = budget - sum(full.values())
        shares = _shares(pool, share, tau)
        over = {name: room[name] for name in pool if rest * shares[name] > room[name]}
        if not over:
            exact = {name: rest * shares[name] for name in pool}
            return {**dict.fromkeys(importance, 0), **full, **_whole(exact, room, rest)}
        full |= over


def _shares(importance: Mapping[str, float], share: Share, tau: float) -> dict[str, float]:
    total = sum(importance.values())
    level = {
        name: math.log(total / value) / tau if share == "softmax_log" else total / value
        for name, value in importance.items()
    }
    top = max(level.values(), default=0.0)
    raw = {name: math.exp(value - top) for name, value in level.items()}
    return {name: value / sum(raw.values()) for name, value in raw.items()}


def _whole(exact: Mapping[str, float], room: Mapping[str, int], total: int) -> dict[str, int]:
    """Round down, then give what is missing to the largest remainders that have room."""
    down = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: (down[name] - exact[name], name))
    missing = total - sum(down.values())
    for name in by_rest:
        more = 1 if missing > 0 and down[name] < room[name] else 0
        down[name] += more
        missing -= more
    return down
