"""Rounds of pruning while somebody trains: when one is due, on what, and what it leaves behind."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from torch_otprune.errors import CalibrationError, LoadError, TargetError
from torch_otprune.plan.compose import composed, relabelled
from torch_otprune.plan.model import Plan
from torch_otprune.plan.rounds import Dense, dense_of, round_policy
from torch_otprune.policy import Layers, Linearize, Policy, Rule, match, module_classes
from torch_otprune.report import Report
from torch_otprune.statistics import collect
from torch_otprune.statistics.reduce import share
from torch_otprune.store.carry import carry_
from torch_otprune.store.plans import WayBack, known_of, remember
from torch_otprune.structure import Call, batch_size, map_tensors
from torch_otprune.structure.fingerprint import fingerprint, layout
from torch_otprune.surgery import compact_, copied, cut_, exchange_

__all__ = ["Rounds", "carries_out"]

_log = logging.getLogger(__name__)


class Carry(Protocol):
    """What carries a plan out, and hands over the report and the way back."""

    def __call__(
        self, model: nn.Module, plan: Plan, data: Any, *, timing: float
    ) -> tuple[Report, WayBack]:
        """Do it."""


Carries = TypeVar("Carries", bound=Carry)
_CARRIES: dict[str, Carry] = {}


def carries_out(function: Carries) -> Carries:
    """Register what carries plans out: the pipeline, which comes after this room.

    Args:
        function: does it; the last one counts.

    Returns:
        the same.
    """
    _CARRIES["out"] = function
    return function


class Rounds:
    """The rounds of one schedule.

    Args:
        model: that is trained.
        policy: with a schedule.
        data: to decide and repair on; None takes what the model was trained on last.
    """

    def __init__(self, model: nn.Module, policy: Policy, data: Any) -> None:
        assert policy.schedule is not None
        self.model, self.policy, self.data = model, policy, data
        self.due = policy.schedule.steps
        self.steps = 0
        self.dense: Dense | None = None
        self.history: list[Plan] = []  # from the dense model to behind each round
        self.recent: deque[Call] = deque()

    @property
    def over(self) -> bool:
        """Tell whether the last round is behind us."""
        return self.steps >= self.due[-1]

    def look(self, batch: Call) -> None:
        """Keep a copy of what the model trains on, if the next round will want it.

        Args:
            batch: about to run.
        """
        if self.data is not None or self.over:
            return
        size, limit = batch_size(batch), share(self.policy.calibration.samples)
        ahead = self.due[bisect_right(self.due, self.steps)] - self.steps
        if (ahead - 1) * size >= limit:  # there will be enough later ones
            return
        with torch.inference_mode(mode=False):
            self.recent.append(map_tensors(batch, lambda t: t.detach().clone()))
        while sum(map(batch_size, self.recent)) - batch_size(self.recent[0]) >= limit:
            self.recent.popleft()

    def advance(self) -> int:
        """Count one optimiser step.

        Returns:
            the number of the round that is due now, from 1; 0 for none.
        """
        self.steps += 1
        if self.steps > self.due[-1]:  # not before: a round that fails is due again
            self.recent.clear()
        number = bisect_right(self.due, self.steps)
        return number if number and self.due[number - 1] == self.steps else 0

    def prune_(self, number: int) -> Report | None:
        """Carry one round out.

        Args:
            number: of the round, from 1.

        Returns:
            the report; None where nothing was to go.

        Raises:
            OTPruneError: with the model as it was.
        """
        from torch_otprune.attach.front import attach, observe

        batches, last = self._batches(), number == len(self.due)
        self._forget_undone()
        bare = _bare(self.policy, self.model if number > 1 else None)
        with attach(self.model, bare, example=batches[0]) as inner:
            graph = inner.graph
            assert graph is not None
            self.dense = self.dense or dense_of(self.model, inner.policy, graph)
            so_far = self.history[-1] if self.history else None
            found = round_policy(
                self.model, self.policy, graph, dense=self.dense, before=so_far, done=number
            )
            if found is None:
                _log.info("round %d of %d: nothing is to go", number, len(self.due))
                return None
            inner.policy = found[0]
            plan = observe(inner, batches).plan()
        plan = plan.model_copy(update={"compacted": self._compacted(plan, batches[0], last=last)})
        # All rounds so far are one plan, so that one replay of it saves and loads.
        whole = relabelled(plan, self.policy, found[1])
        whole = composed(self.history[-1], whole) if self.history else whole
        before = known_of(self.model) if self.history else None
        report, way = _CARRIES["out"](self.model, plan, batches, timing=0.0)
        way.lengthen(whole, way.known if before is None else before[1])
        self.history.append(whole)
        return report

    def _forget_undone(self) -> None:
        known = known_of(self.model)
        while self.history and (known is None or known[0] is not self.history[-1]):
            self.history.pop()

    def _batches(self) -> list[Any]:
        samples = share(self.policy.calibration.samples)
        data = list(self.recent) if self.data is None else self.data
        if self.data is None and not data:
            raise CalibrationError(
                "a round is due, and no batch was seen since the last one.",
                where=f"Attached.step, step {self.steps}",
                fix="run the model itself in training mode, not a compiled or copied one, between "
                "two steps; or pass data= to attach.",
            )
        return collect(self.model, data, samples)

    def _compacted(self, plan: Plan, example: Any, *, last: bool) -> tuple[str, ...]:
        """List what leaves its list: in the last round only, so that paths stay what they are."""
        earlier = self.history[-1].drops if self.history else ()
        if not last or plan.drops or not earlier:
            return plan.compacted if last else ()
        small = copied(self.model)
        cut_(small, plan.cuts)
        exchange_(small, plan.drops)
        return compact_(small, example)

    def state_dict(self) -> dict[str, Any]:
        """Write how far the schedule is, as plain values."""
        self._forget_undone()
        return {
            "steps": self.steps,
            "plans": [plan.to_json() for plan in self.history],
            "dense": None if self.dense is None else self.dense.model_dump_json(),
            "layout": dict(layout(self.model)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another run was; a dense model is given the shapes it had there.

        Args:
            state: what `state_dict` wrote.

        Raises:
            LoadError: if the model is neither the dense one nor the pruned one.
        """
        history = [Plan.from_json(text) for text in state["plans"]]
        pruned = layout(self.model) == state["layout"]
        if history and not pruned:
            self._reshape_(history[-1], state["layout"])
        elif history and known_of(self.model) is None:
            remember(self.model, history[-1])
        self.steps = int(state["steps"])
        self.dense = None if state["dense"] is None else Dense.model_validate_json(state["dense"])
        known = known_of(self.model)
        self.history = [*history[:-1], known[0]] if history and known is not None else []

    def _reshape_(self, plan: Plan, wanted: Mapping[str, str]) -> None:
        if fingerprint(self.model) != plan.fingerprint:
            raise LoadError(
                "this state is of another model.",
                where=f"Attached.load_state_dict, {type(self.model).__name__}",
                fix="attach to the dense model as it was before the first round, or to the pruned "
                "one of the same checkpoint.",
            )
        before = dict(layout(self.model))
        carry_(self.model, plan)
        remember(self.model, plan, before)
        assert layout(self.model) == wanted


def _bare(policy: Policy, model: nn.Module | None) -> Policy:
    """Leave out what belongs to training, and rules whose last target went in an earlier round."""
    rules = tuple(
        rule.model_copy(update={"penalty": None}) if isinstance(rule, (Layers, Linearize)) else rule
        for rule in policy.rules
        if model is None or _reaches(rule, module_classes(model))
    )
    return policy.model_copy(update={"rules": rules or policy.rules, "schedule": None})


def _reaches(rule: Rule, classes: Mapping[str, tuple[str, ...]]) -> bool:
    try:
        match(rule.targets, rule.ignore, classes, where="")
    except TargetError:
        return False
    return True
