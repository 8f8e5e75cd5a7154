"""Differentiable transportation pruning: which units stay, found while the user trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_otprune.criteria.masks import UNTRAINED, MaskSetting
from torch_otprune.errors import BudgetError, CalibrationError, LoadError
from torch_otprune.statistics.evidence import Learnt
from torch_otprune.statistics.reduce import ranks, ranks_where
from torch_otprune.structure.graph import CostModel
from torch_otprune.training.linearised import Linearised
from torch_otprune.training.pool import Pool, Price
from torch_otprune.training.settle import settled

__all__ = ["Search"]


class Search:
    """Scores, masks and their budget, from the first step to hard masks.

    Every step adds the scores to the logits of the masks, finds the thresholds that meet the
    budgets at the present widths, and so hardens the masks by itself: with scores that stand
    still, the softness at step t is eps / t. The gradient of the loss in the masks, gathered by
    the user's own backward passes, moves the scores.

    Limits: a budget of parameters or MACs is met to first order at every step, and exactly by
    the hard masks.

    Args:
        setting: how masks are trained.
        pools: who shares a threshold.
        costs: one exact cost per measure.
        limits: what the whole model keeps, by measure; empty where rules say how much they keep.
        widths: the dense widths of all groups and blocks.

    Raises:
        BudgetError: if a limit is below what the narrowest widths cost.

    Source: Li et al. 2023 for the problem; proximal steps as accumulated logits, the exact
    threshold, the linearised cost and the automatic softness are ours.
    """

    def __init__(
        self,
        setting: MaskSetting,
        pools: Sequence[Pool],
        *,
        costs: Mapping[str, CostModel],
        limits: Mapping[str, int],
        widths: Mapping[str, int],
    ) -> None:
        self.setting, self.pools, self.limits = setting, tuple(pools), dict(limits)
        self.costs = {name: costs[name] for name in limits}
        self.dense = dict(widths)
        self.taken, self.lost, self.hard, self.rest = 0, 0, False, 0.0
        self._linear = {name: Linearised(cost) for name, cost in self.costs.items()}
        self._whole = {name: float(cost.at(widths)) for name, cost in self.costs.items()}
        self._reachable()
        self.eps = self._eps()
        self.masks: dict[str, Tensor] = {}
        self._advance()

    @property
    def softness(self) -> float:
        """Average m (1 - m) over all units: 0.25 at most, 0 where masks are hard."""
        soft = [(pool.flat * (1 - pool.flat)).sum(dtype=torch.float64) for pool in self.pools]
        return float(sum(soft)) / sum(len(pool.flat) for pool in self.pools)

    @property
    def widths(self) -> dict[str, float]:
        """Sum the masks of every group and block up; others are whole."""
        found: dict[str, float] = dict(self.dense)
        for pool in self.pools:
            found |= pool.widths()
        return found

    def step(self, *, seen: bool) -> bool:
        """End one step of training: move scores and masks.

        Args:
            seen: whether the model ran with the masks since the last step.

        Returns:
            whether the masks became hard just now.

        Raises:
            CalibrationError: if no gradient reached the masks.
        """
        if self.hard:
            return False
        reached = seen and any(mask.grad is not None for mask in self.masks.values())
        if len(ranks_where(reached)) < ranks():  # all fail, or those that wait hang
            raise CalibrationError(
                "no gradient reached the masks since the last step.",
                where=f"Attached.step, criterion 'dtp', step {self.taken + 1}",
                fix="run the module itself, not a compiled or copied one, call loss.backward(), "
                "then optimizer.step(), then attached.step(), once each.",
            )
        self.taken += 1
        moved = [p.learn_(self.masks, self.eps, lr=self._lr, step=self.taken) for p in self.pools]
        self.lost += not all(moved)
        if self.taken >= self.setting.steps:
            self.harden()
            return True
        self._advance()
        return False

    @property
    def note(self) -> str:
        """Say how hard masks came about."""
        if not self.taken:
            return UNTRAINED
        lost = f"; in {self.lost} of them a gradient was NaN or infinite, and moved nothing"
        soft = self.eps / (self.taken if self.setting.mode == "proximal" else 1)
        return (
            f"dtp: masks are hard since step {self.taken} of {self.setting.steps}, at a softness "
            f"of {soft:.1e} (eps {self.eps:.2g}); the mean of m(1-m) was {self.rest:.1e} before"
            + (lost if self.lost else "")
        )

    def harden(self) -> None:
        """Settle what stays: masks are 0 or 1 from now on, and every budget holds exactly."""
        if self.hard:
            return
        self.rest = self.softness
        keep = settled(self.pools, self.costs, self.limits, self.dense)
        for pool in self.pools:
            pool.flat = torch.cat([keep[name] for name in pool.names]).to(pool.flat)
        self.hard = True
        self._publish()

    def learnt(self, names: Collection[str]) -> dict[str, Learnt]:
        """Say what was decided.

        Args:
            names: seats that are asked for.

        Returns:
            seat to decision; the first one notes how it came about. Empty before any step.
        """
        if not self.hard:
            return {}
        note = self.note
        found: dict[str, Learnt] = {}
        for pool in self.pools:
            flats = zip(pool.names, pool.logits.split(pool.sizes), strict=True)
            for name, logits in ((n, own) for n, own in flats if n in names):
                keep = self.masks[name].detach().cpu() > 0
                found[name] = Learnt(logits.double().cpu(), keep, "" if found else note)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Write everything that training needs to go on as if it had not stopped."""
        return {
            "steps": self.taken,
            "lost": self.lost,
            "hard": self.hard,
            "rest": self.rest,
            "eps": self.eps,
            "pools": [pool.state_dict() for pool in self.pools],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote.

        Args:
            state: of a search over the same groups.

        Raises:
            LoadError: if it is of another one.
        """
        told = [(pool["names"], pool["sizes"]) for pool in state["pools"]]
        if told != [(pool.names, list(pool.sizes)) for pool in self.pools]:
            raise LoadError(
                "this state masks other groups.",
                where="Attached.load_state_dict, criterion 'dtp'",
                fix="attach to the dense model that the checkpoint was made with.",
            )
        self.taken, self.lost = int(state["steps"]), int(state["lost"])
        self.hard = bool(state["hard"])
        self.rest, self.eps = float(state["rest"]), float(state["eps"])
        for pool, known in zip(self.pools, state["pools"], strict=True):
            pool.load_state_dict(known)
        self._publish()

    @property
    def _lr(self) -> float:
        given = self.setting.lr
        return 2 / self.setting.steps if given == "auto" else float(given)

    @property
    def _left(self) -> float:
        """Say what share of all that is to go is still there."""
        span = self.setting.ramp * self.setting.steps
        return max(0.0, 1 - self.taken / span) ** 3 if span else 0.0

    def _eps(self) -> float:
        if self.setting.eps != "auto":
            return float(self.setting.eps)
        steps = self.setting.steps if self.setting.mode == "proximal" else 1
        found = []
        for pool in self.pools:
            price = self._prices(pool, left=0.0)[0]
            total = sum(c * n for c, n in zip(price.costs, pool.sizes, strict=True))
            found.append(pool.softness(price.budget / max(total, 1e-300), steps))
        return max(found)

    def _advance(self) -> None:
        """Make the masks of the next step."""
        for pool in self.pools:
            pool.push_(self.eps, keeps=self.setting.mode == "proximal")
            pool.solve_(self._prices(pool, left=self._left))
        self._publish()

    def _publish(self) -> None:
        for pool in self.pools:
            self.masks |= pool.masks()
        if self.hard:
            for mask in self.masks.values():
                mask.requires_grad_(False)

    def _prices(self, pool: Pool, *, left: float) -> list[Price]:
        """Write the budgets of a pool, to first order around the present widths."""
        if pool.count is not None:
            units = sum(pool.sizes)
            budget = pool.count + left * (units - pool.count)
            return [Price((1.0,) * len(pool.seats), budget)]
        return [self._price(pool, measure, left) for measure in self.limits]

    def _price(self, pool: Pool, measure: str, left: float) -> Price:
        widths, limit = self.widths, float(self.limits[measure])
        total, slopes = self._linear[measure].at(widths)
        own = sum(slopes[name] * widths[name] for name in pool.names)
        goal = limit + left * max(self._whole[measure] - limit, 0.0)
        return Price(tuple(slopes[name] for name in pool.names), goal - total + own)

    def _reachable(self) -> None:
        """Refuse a limit below what the narrowest widths cost."""
        least = self.dense | {s.name: s.widths[0] for pool in self.pools for s in pool.seats}
        for measure, limit in self.limits.items():
            cost, whole = self.costs[measure].at(least), self._whole[measure]
            if cost > limit:
                raise BudgetError(
                    f"a budget of {limit:,} {measure} cannot be reached: the least is {cost:,} "
                    f"({cost / max(whole, 1):.1%}).",
                    where=f"Budget.{measure}, criterion 'dtp'",
                    fix=f"keep at least {cost / max(whole, 1):.1%} of {measure}, or target more.",
                )
