"""Take blocks out: put what stands in for them in their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from torch_otprune.errors import PlanError
from torch_otprune.nn import ChannelScale, LowRank, Perceptron, Skip, Zero
from torch_otprune.plan.model import Drop
from torch_otprune.structure.graph import Swap
from torch_otprune.structure.layers import channels
from torch_otprune.surgery.standin import stand_in_

__all__ = ["STAND_INS", "check_drops", "exchange_", "gone"]

STAND_INS = (Skip, Zero, ChannelScale, LowRank, Perceptron)


def exchange_(model: nn.Module, drops: Sequence[Drop]) -> None:
    """Replace every removed module by its stand-in. Paths of the others stay as they are.

    Args:
        model: the dense model, or a cut one.
        drops: a plan's decisions for it.

    Raises:
        PlanError: if a module is missing; nothing is written then.
    """
    check_drops(model, drops)
    swaps = [_fitting(model, swap) for drop in drops for swap in drop.swaps]
    for swap in swaps:
        old = model.get_submodule(swap.path)
        with torch.device("cpu"):  # whatever the user's default device is
            new = _stand_in(swap).train(old.training)
        first = next(old.parameters(), None)
        if first is not None and first.is_floating_point():
            new.to(device=first.device, dtype=first.dtype)
        stand_in_(model, swap.path, new)


def _fitting(model: nn.Module, swap: Swap) -> Swap:
    """Give a stand-in the width that cuts have left to the stream."""
    width = channels(model.get_submodule(swap.like), "out") if swap.like else None
    return swap if width is None else replace(swap, size=width)


def _stand_in(swap: Swap) -> nn.Module:
    if swap.by == "zero":
        return Zero(swap.size, swap.wiring, axis=swap.axis)
    if swap.by == "scale":
        return ChannelScale(swap.size, swap.axis, wiring=swap.wiring)
    if swap.by in ("low_rank", "hidden"):
        kind = LowRank if swap.by == "low_rank" else Perceptron
        with torch.random.fork_rng(devices=[]):  # its first values do not matter: it is fitted
            return kind(swap.size, swap.rank, swap.axis, wiring=swap.wiring)
    return Skip(swap.wiring)


def check_drops(model: nn.Module, drops: Iterable[Drop]) -> None:
    """Make sure that every module that is to go is there.

    Args:
        model: the dense model.
        drops: a plan's decisions.

    Raises:
        PlanError: naming the first module that is missing.
    """
    names = {name for name, _ in model.named_modules()}
    for swap in (swap for drop in drops for swap in drop.swaps):
        if swap.path not in names or (swap.like and swap.like not in names):
            raise PlanError(
                "the plan removes a module that the model has not.",
                where=f"'{swap.path}'",
                fix="apply the plan to the dense model it was made for.",
            )


def gone(drops: Iterable[Drop], path: str) -> bool:
    """Tell whether a module was removed with a block.

    Args:
        drops: a plan's decisions.
        path: a module of the dense model.

    Returns:
        whether it is one of the removed modules, or inside of one.
    """
    heads = (swap.path for drop in drops for swap in drop.swaps)
    return any(path == head or path.startswith(f"{head}.") for head in heads)
