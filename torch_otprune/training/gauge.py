"""How large the penalty's gradient is beside the task's, measured inside the user's backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Gauge"]


class Gauge:
    """One measurement: the penalty's gradient at once, the task's when the user's loss runs back.

    The loss may be scaled as a whole (for half precision, or to accumulate): the gradient that
    reaches the penalty tells by how much. What reaches the parameters, less the penalty's own
    share of it, is the task's.

    Args:
        raw: the penalty before its weight.
        loss: the penalty as it goes into the loss.
        weight: the factor between the two.
        parameters: where both gradients are measured.
    """

    def __init__(
        self, raw: Tensor, loss: Tensor, *, weight: float, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.weight = weight
        self._own = torch.autograd.grad(raw, parameters, retain_graph=True, allow_unused=True)
        self._scale: Tensor | None = None
        self._squares: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = [loss.register_hook(_Scale(self))]
        self._handles += [
            parameter.register_hook(_Arrive(self, index))
            for index, parameter in enumerate(parameters)
            if self._own[index] is not None
        ]

    def scaled(self, gradient: Tensor) -> None:
        """Take notice of how the loss was scaled."""
        self._scale = gradient.detach()

    def arrived(self, index: int, gradient: Tensor) -> None:
        """Take notice of the whole loss's gradient at one parameter."""
        own = self._own[index]
        # Of several backward passes only the first belongs to the batch that was measured.
        if own is not None and self._scale is not None and index not in self._squares:
            task = gradient.detach() / self._scale - self.weight * own
            self._squares[index] = task.double().square().sum()

    @property
    def complete(self) -> bool:
        """Say whether the loss was run back."""
        wanted = sum(gradient is not None for gradient in self._own)
        return 0 < wanted == len(self._squares)

    def read(self) -> tuple[float, float]:
        """Sum up and let go of everything.

        Returns:
            squared norms of the task's and of the penalty's gradient, without any scale; NaN
            where the loss was not run back.
        """
        for handle in self._handles:
            handle.remove()
        squares = float("nan"), float("nan")
        if self.complete:
            own = [g.double().square().sum() for g in self._own if g is not None]
            squares = float(sum(self._squares.values())), float(sum(own))
        self._own, self._squares, self._handles = (), {}, []
        return squares


class _Scale:
    """The hook on the penalty in the loss."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge

    def __call__(self, gradient: Tensor) -> None:
        self.gauge.scaled(gradient)


class _Arrive:
    """The hook on one parameter."""

    def __init__(self, gauge: Gauge, index: int) -> None:
        self.gauge, self.index = gauge, index

    def __call__(self, gradient: Tensor) -> None:
        self.gauge.arrived(self.index, gradient)
