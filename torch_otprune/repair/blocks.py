"""The smallest modules around the cuts: what a block-wise repair trains and compares."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torch_otprune.plan.model import Cut

__all__ = ["blocks"]


def blocks(model: nn.Module, cuts: Sequence[Cut]) -> tuple[str, ...]:
    """Find, for every cut, the smallest module that holds all of its layers.

    Args:
        model: the dense model.
        cuts: a plan's decisions.

    Returns:
        paths, outermost only; the model itself (the empty path) is left out, because its output
        is compared anyway.
    """
    homes = {_home([piece.path for piece in cut.slices]) for cut in cuts} - {""}
    outer = [h for h in homes if not any(h != o and h.startswith(f"{o}.") for o in homes)]
    order = [name for name, _ in model.named_modules()]
    return tuple(sorted((h for h in outer if h in order), key=order.index))


def _home(paths: Sequence[str]) -> str:
    parts = [path.split(".")[:-1] for path in paths]
    common = []
    for level in zip(*parts, strict=False):  # the shortest path ends it
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
