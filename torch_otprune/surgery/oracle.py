"""Pruned equals masked: a cut must compute what the dense model does without the units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.plan.model import Cut, Drop
from torch_otprune.structure.forward import evaluating, first_line, flat_tensors, run
from torch_otprune.structure.mute import muted
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import cut_, merged
from torch_otprune.surgery.exchange import exchange_

__all__ = ["compared", "disagreement", "gap", "masked"]


class _Mask:
    """A hook that zeroes the input channels that a slice drops."""

    def __init__(self, keep: Sequence[int], size: int, axis: int) -> None:
        self.mask = torch.zeros(size, device="cpu")
        self.mask[list(keep)] = 1
        self.axis = axis

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._masked(args[0]), *args[1:]), kwargs
        return args, {name: self._masked(x) for name, x in kwargs.items()}

    def _masked(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.axis if self.axis >= 0 else x.dim() + self.axis] = -1
        return x * self.mask.to(x).view(shape)


@contextmanager
def masked(model: nn.Module, cuts: Sequence[Cut]) -> Iterator[None]:
    """Zero, at every consumer, the channels that the cuts would remove.

    Args:
        model: the dense model.
        cuts: a plan's decisions.

    Yields:
        nothing; the hooks are gone afterwards.
    """
    handles = []
    try:
        for piece in (p for p in merged(cuts) if p.side == "in"):
            module = model.get_submodule(piece.path)
            axis = -1 if isinstance(module, nn.Linear) else 1
            mask = _Mask(piece.keep, piece.size, axis)
            handles.append(module.register_forward_pre_hook(mask, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def disagreement(
    model: nn.Module, cuts: Sequence[Cut], example: Any, *, drops: Sequence[Drop] = ()
) -> float:
    """Cut a copy and compare it with the masked original on an example.

    Costs one copy of the model and two forward passes.

    Args:
        model: the dense model; left as it was.
        cuts: a plan's decisions.
        example: one batch.
        drops: blocks to take out as well.

    Returns:
        the largest difference relative to the largest output; infinity where the cut model
        does not run or its output has another shape.
    """
    return compared(model, cuts, example, drops=drops)[0]


def compared(
    model: nn.Module, cuts: Sequence[Cut], example: Any, *, drops: Sequence[Drop] = ()
) -> tuple[float, str]:
    """Measure the disagreement, and say what it is.

    Args:
        model: the dense model; left as it was.
        cuts: a plan's decisions.
        example: one batch.
        drops: blocks to take out as well.

    Returns:
        as `disagreement`, and one clause.
    """
    small = copied(model)
    cut_(small, cuts)
    exchange_(small, drops)
    with evaluating(model), torch.no_grad():
        with masked(model, cuts), muted(model, [drop.swaps[0] for drop in drops]):
            expected = flat_tensors(run(model, example))
        try:
            with evaluating(small):
                got = flat_tensors(run(small, example))
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            return float("inf"), f"without it the model does not run: {first_line(error)}"
    if [t.shape for t in expected] != [t.shape for t in got]:
        few, many = len(got), len(expected)
        change = "tensors of other shapes" if few == many else f"{few} tensors instead of {many}"
        return float("inf"), f"without it the model returns {change}"
    far = gap(expected, got)
    return far, f"cut and masked outputs differ by {far:.1e} of the largest output"


def gap(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Measure the largest difference between two lists of outputs.

    Args:
        expected: the reference.
        got: as many tensors of the same shapes.

    Returns:
        relative to the reference's largest entry; infinity where shapes differ.
    """
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    pairs = [
        (a, b) for a, b in zip(expected, got, strict=True) if a.is_floating_point() and a.numel()
    ]
    scale = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    worst = max((float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs), default=0.0)
    return worst / scale if scale else worst
