"""The max-sliced distance between what goes into a block and what comes out of it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from torch_otprune.policy.base import problem
from torch_otprune.training.base import Memory, Penalty, register, wide
from torch_otprune.training.directions import ascend, gaps, principal, unit
from torch_otprune.transport.line import sort_rows

__all__ = ["MaxSliced"]

_WALKERS = 4  # starts that climb
_FLOOR = 0.1  # a direction in which the input hardly varies counts as this share of an entry's RMS


@register
class MaxSliced(Penalty):
    """Pull a block's output distribution onto its input's, in the direction that tells most.

    Every sample is one point: features of all channels and positions. The distance is W_2 along
    the worst direction found; the gradient flows through the sorted projections, not through the
    direction. By default the directions are informed (shift of the mean, principal ones of both
    clouds, the last step's, a few at random, then some ascent steps), and the distance is in
    units of the input's own spread along that direction, so shrinking all features gains
    nothing. As published it is `directions="random", projections=50, relative=False` with a
    fixed `weight`.

    Limits: a block that permutes its samples costs nothing: rank blocks by a paired criterion
    afterwards, or add `paired`. Inputs of changing size lose the warm start at every change.

    Source: Quétu et al. 2025 (LaCoOT), whose code takes the best of 50 random directions; in
    4096 dimensions those see 4 % of a shift of one coordinate. Directions, scale and the paired
    term are ours.

    Example:
        >>> x = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
        >>> penalty = MaxSliced(relative=False)
        >>> penalty.value(x, x + 2.0, Memory(seed=0))  # a shift by 2 in 10 coordinates
        tensor(6.3246)
    """

    kind: Literal["max_sliced"] = "max_sliced"
    directions: Literal["informed", "random"] = Field(
        default="informed", description="search for the worst direction, or only draw some"
    )
    projections: int = Field(default=16, ge=1, description="random directions, new at every step")
    pca: int = Field(default=4, ge=0, description="principal directions to start from")
    ascent: int = Field(default=5, ge=0, description="ascent steps from the best starts")
    search: int = Field(
        default=10,
        ge=1,
        description="steps between two searches; in between the last direction and the shift of "
        "the mean stand for all",
    )
    decay: float = Field(
        default=0.9, ge=0, lt=1, description="how much of the last direction is kept in a step"
    )
    relative: bool = Field(
        default=True, description="divide by the input's standard deviation in that direction"
    )
    paired: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="factor of the squared change per sample, relative to the input's square",
    )

    @model_validator(mode="after")
    def _search_or_draw(self) -> Self:
        for name in ("pca", "ascent", "search", "decay") if self.directions == "random" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise problem(
                    f"{name} belongs to informed directions, and these are random.",
                    fix=f"drop {name}, or set directions to 'informed'.",
                    key=name,
                )
        return self

    def value(self, x: Tensor, y: Tensor, memory: Memory) -> Float[Tensor, ""]:
        """Measure the distance on one batch.

        Args:
            x: the block's input, samples first.
            y: its output, of the same shape.
            memory: the directions of earlier steps.

        Returns:
            W_2 in the worst direction; in standard deviations of the input if `relative`.
        """
        x, y = wide(x).reshape(len(x), -1), wide(y).reshape(len(y), -1)
        with torch.no_grad():
            theta = self._direction(x.detach(), y.detach(), memory)
        moved = sort_rows((x @ theta)[None]) - sort_rows((y @ theta)[None])
        distance: Tensor = torch.linalg.vector_norm(moved) / len(x) ** 0.5  # zero gradient at zero
        if self.relative:
            distance = distance / _spread(x.detach(), y.detach(), theta)
        if self.paired:
            distance = distance + self.paired * _change(x, y)
        return distance

    def _direction(self, x: Tensor, y: Tensor, memory: Memory) -> Tensor:
        if self.directions == "random":
            drawn = unit(memory.draw(x, self.projections))
            return drawn.index_select(1, gaps(x, y, drawn).argmax()[None])[:, 0]
        last = memory.recall("direction", x, 1)
        starts = [unit((y - x).mean(0)[:, None])] + ([] if last is None else [last])
        # Not at the first of the steps: the weight is measured there, and most steps do not search.
        if last is not None and memory.steps % self.search != self.search // 2:
            theta = torch.cat(starts, dim=1)
            return theta.index_select(1, gaps(x, y, theta).argmax()[None])[:, 0]
        starts += [unit(memory.draw(x, self.projections)), *self._axes(x, y, memory)]
        every = torch.cat(starts, dim=1)
        theta = ascend(x, y, every, steps=self.ascent, width=_WALKERS)
        memory.learn("direction", self._followed(theta, last))
        return theta

    def _axes(self, x: Tensor, y: Tensor, memory: Memory) -> list[Tensor]:
        """Follow the principal directions of both clouds."""
        count = min(self.pca, 2 * len(x), x.shape[1])
        if not count:
            return []
        last = memory.recall("axes", x, count)
        start = memory.draw(x, count) if last is None else last
        axes = principal(torch.cat([x, y]), start, warm=last is not None)
        memory.learn("axes", axes)
        return [axes]

    def _followed(self, theta: Tensor, last: Tensor | None) -> Tensor:
        """Average with the last direction; a direction and its opposite are the same."""
        if last is None:
            return theta[:, None]
        side = torch.where(last[:, 0] @ theta < 0, -1.0, 1.0)
        return unit(self.decay * last + (1 - self.decay) * side * theta[:, None])


def _spread(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """Measure the input's standard deviation along a direction, and never call it nothing."""
    # Where the input is constant, the size of a typical entry stands in for its spread.
    size = torch.linalg.vector_norm(x).maximum(torch.linalg.vector_norm(y))
    spread = (x @ theta).std(correction=0).maximum(size * (_FLOOR / x.numel() ** 0.5))
    return spread.clamp(min=torch.finfo(x.dtype).tiny)


def _change(x: Tensor, y: Tensor) -> Tensor:
    """Relate the squared change to the squared input, which is not to grow for it."""
    power = x.detach().square().mean().maximum(_FLOOR**2 * y.detach().square().mean())
    return (y - x).square().mean() / power.clamp(min=torch.finfo(x.dtype).tiny)
