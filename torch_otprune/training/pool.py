"""Units that share one threshold: their scores, logits and masks, and how they move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.statistics.reduce import all_sum_, first_rank_, ranks
from torch_otprune.transport.threshold import fill_, threshold

__all__ = ["Pool", "Price", "Seat"]

_MIDDLE, _SPREAD = 0.5, 0.1  # of the scores at the start
_LEAST = 0.02  # median distance from the threshold that a softness is made for
_FIRM = 10.0  # logits between the median unit and the threshold when the search ends
_CLAMP = 40.0
_SOME = 100_000  # scores that a softness is chosen by
_WHOLE = 1e-6  # share of a budget that may be left over when nothing has to go
_NEARLY = 1e-3  # share of a least width that rounding may miss
_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Seat:
    """What is masked under one name: the units of a group, or one block.

    Args:
        name: of the group or block.
        start: what its scores start from, one number per unit; only their order and spacing count.
        widths: how many may stay, ascending.
    """

    name: str
    start: Float[Tensor, " units"]
    widths: tuple[int, ...]

    @property
    def units(self) -> int:
        """Count the units."""
        return len(self.start)


@dataclass(frozen=True)
class Price:
    """A budget to first order.

    Args:
        costs: of one unit of each seat.
        budget: what the masks times their costs may sum up to.
    """

    costs: tuple[float, ...]
    budget: float

    @property
    def free(self) -> bool:
        """Tell whether nothing costs anything."""
        return max(self.costs) <= 0


class Pool:
    """The state of units that share one threshold.

    Args:
        seats: who shares it.
        count: how many units stay in all; None where the policy's budget says.
        device: of the state.
    """

    def __init__(self, seats: Sequence[Seat], count: int | None, device: torch.device) -> None:
        self.seats, self.count = tuple(seats), count
        self.sizes = [seat.units for seat in seats]
        start = torch.cat([_standard(seat.start) for seat in seats])
        self.scores = start.to(device=device, dtype=torch.float32)
        self.logits = torch.zeros_like(self.scores)
        self.first, self.second = torch.zeros_like(self.scores), torch.zeros_like(self.scores)
        self.flat = torch.ones_like(self.scores)
        self.paid = torch.ones_like(self.scores[:1])

    @property
    def names(self) -> list[str]:
        """List the seats."""
        return [seat.name for seat in self.seats]

    def masks(self) -> dict[str, Tensor]:
        """Give every seat its part of the masks, as a leaf that gathers gradients."""
        parts = self.flat.split(self.sizes)
        return {n: p.detach().requires_grad_() for n, p in zip(self.names, parts, strict=True)}

    def widths(self) -> dict[str, float]:
        """Sum every seat's masks up."""
        sums = [float(part.sum(dtype=torch.float64)) for part in self.flat.split(self.sizes)]
        return dict(zip(self.names, sums, strict=True))

    def softness(self, share: float, steps: int) -> float:
        """Choose eps so that the median unit ends firmly on its side.

        Args:
            share: of the units that stay.
            steps: that add to the logits.

        Returns:
            a positive number in the unit of the scores.
        """
        some = self.scores[:: max(1, len(self.scores) // _SOME)]
        level = some.quantile(min(max(1 - share, 0.0), 1.0))
        gap = float((some - level).abs().median())
        return 2 * steps * max(gap, _LEAST) / _FIRM

    def learn_(self, masks: Mapping[str, Tensor], eps: float, *, lr: float, step: int) -> bool:
        """Move the scores against the gradient that the masks gathered, alike on all ranks.

        Args:
            masks: leaves, with their gradients.
            eps: softness.
            lr: step size.
            step: number of this update, from 1.

        Returns:
            whether they moved: not where the gradient is NaN or infinite.
        """
        gathered = [(masks[name], masks[name].grad) for name in self.names]
        pull = torch.cat([torch.zeros_like(m) if g is None else g for m, g in gathered])
        all_sum_([pull])
        pull /= ranks()
        if not bool(pull.isfinite().all()):
            return False  # half precision overflowed: the optimiser skips this step as well
        slope = self.flat * (1 - self.flat)
        paid = self.paid * slope
        total = paid.sum(dtype=torch.float64)
        level = (slope * pull).sum(dtype=torch.float64) / total if total > 0 else total
        self._descend_((2 / eps) * (slope * pull - paid * level.float()), lr, step)
        return True

    def _descend_(self, slope: Tensor, lr: float, step: int) -> None:
        """Take one step of Adam."""
        self.first.lerp_(slope, 1 - _BETAS[0])
        self.second.lerp_(slope.square(), 1 - _BETAS[1])
        spread = (self.second / (1 - _BETAS[1] ** step)).sqrt_().add_(1e-12)
        self.scores -= lr * (self.first / (1 - _BETAS[0] ** step)) / spread

    def push_(self, eps: float, *, keeps: bool) -> None:
        """Add the scores to the logits.

        Args:
            eps: softness.
            keeps: whether the logits of the last step count; otherwise they start anew.
        """
        gain = (2 * self.scores - 2 * _MIDDLE) / eps
        self.logits = self.logits + gain if keeps else gain

    def solve_(self, prices: Sequence[Price]) -> None:
        """Set the masks so that every budget holds, and one of them exactly.

        Args:
            prices: one per measure.
        """
        pinned = torch.zeros_like(self.flat, dtype=torch.bool)
        level = self._level(prices, pinned)
        for _ in self.seats:  # a budget must not empty a group
            if level is None or not (short := self._short()):
                break
            for i in short:
                best = self.logits.split(self.sizes)[i].argsort(descending=True, stable=True)
                pinned.split(self.sizes)[i][best[: self.seats[i].widths[0]]] = True
            level = self._level(prices, pinned)
        if level is None:
            self.flat.fill_(1.0)
            return
        self.logits = (self.logits - level).clamp_(-_CLAMP, _CLAMP)

    def _level(self, prices: Sequence[Price], pinned: Tensor) -> float | None:
        """Find the threshold that meets all budgets, and fill the masks in; None if all stay."""
        logits = self.logits
        if bool(pinned.any()):
            logits = logits.masked_fill(pinned, float(logits.max()) + 2 * _CLAMP)
        found: tuple[float, Tensor] | None = None
        for price in (price for price in prices if not price.free):
            costs = self._spread(price)
            every = costs.expand_as(logits)
            total = float(costs.double().sum()) * (len(logits) // len(costs))
            least = float(every[pinned].double().sum())
            budget = max(price.budget, least + _WHOLE * (total - least), _WHOLE * total)
            if budget >= (1 - _WHOLE) * total:
                continue
            own = float(costs) if len(self.seats) == 1 else costs
            at = threshold([logits], budget, costs=[own]).at
            found = max(found or (-math.inf, costs), (at, costs), key=lambda pair: pair[0])
        if found is None:
            return None
        level = torch.tensor([found[0]], dtype=torch.float64, device="cpu")
        first_rank_([level])  # a histogram on a GPU adds up in any order
        self.paid = found[1]
        fill_(self.flat, logits, float(level), 1.0)
        return float(level)

    def _spread(self, price: Price) -> Tensor:
        """Give every unit its cost, one for all of a single seat; free ones cost next to none."""
        if len(self.seats) == 1:
            return torch.tensor(price.costs).to(self.flat)
        each = torch.tensor(price.costs, dtype=torch.float64).clamp_min(_WHOLE * max(price.costs))
        counts = torch.tensor(self.sizes)
        return each.repeat_interleave(counts).to(self.flat)

    def _short(self) -> list[int]:
        """List the seats that keep less than they must."""
        sums = self.widths().values()
        pairs = enumerate(zip(sums, self.seats, strict=True))
        return [i for i, (kept, seat) in pairs if kept < (1 - _NEARLY) * seat.widths[0]]

    def state_dict(self) -> dict[str, Any]:
        """Write everything that the next step depends on."""
        tensors = {name: getattr(self, name).clone() for name in _STATE}
        return {"names": self.names, "sizes": list(self.sizes), **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote."""
        for name in _STATE:
            setattr(self, name, state[name].to(self.flat).clone())


_STATE = ("scores", "logits", "first", "second", "flat", "paid")


def _standard(start: Tensor) -> Tensor:
    """Bring scores to a mean of 0.5 and a spread of 0.1."""
    wide = start.detach().double().cpu()
    spread = wide.std() if len(wide) > 1 else wide.new_zeros(())
    if not spread > 0:
        return torch.full_like(wide, _MIDDLE)
    return _MIDDLE + _SPREAD * ((wide - wide.mean()) / spread).clamp(-3, 3)
