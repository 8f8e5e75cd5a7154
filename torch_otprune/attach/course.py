"""What an attached policy does while somebody trains: penalties, rounds, and distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.attach.pressures import pressures
from torch_otprune.attach.rounds import Rounds
from torch_otprune.errors import CalibrationError, LoadError, PolicyError
from torch_otprune.policy import Policy
from torch_otprune.report import Report
from torch_otprune.structure import Call, Graph
from torch_otprune.surgery import copied
from torch_otprune.surgery.rebind import Optimizes
from torch_otprune.training import Distill, Pressure
from torch_otprune.training.distill import Match

__all__ = ["Course"]


class Course:
    """One training under one policy.

    Args:
        model: that is trained.
        policy: the declaration.
        data: what rounds decide on; None takes what the model was trained on last.
    """

    def __init__(self, model: nn.Module, policy: Policy, data: Any) -> None:
        self.model, self.policy = model, policy
        self.rounds = None if policy.schedule is None else Rounds(model, policy, data)
        self.pressures: tuple[Pressure, ...] = ()
        self.distilled: Distill | None = None
        self._taught = False  # somebody asks for the teacher
        self._pruned = False

    def press(self, graph: Graph | None) -> None:
        """Put the rules' penalties to work on a model that was just analysed.

        Those of an earlier round go on where they were; behind the last round there are none.

        Args:
            graph: the analysis; None where the policy needs none.
        """
        if graph is None or self.over:
            self.pressures = ()
            return
        found = pressures(self.model, self.policy, graph)
        known = {p.state_dict()["seed"]: p.state_dict() for p in self.pressures}
        for pressure in found:
            state = known.get(pressure.state_dict()["seed"])
            if state is not None:
                pressure.load_state_dict({**state, "blocks": list(pressure.blocks)})
        self.pressures = found

    @property
    def trains(self) -> bool:
        """Tell whether passes that train are no calibration."""
        return bool(self.pressures) or self.rounds is not None

    @property
    def over(self) -> bool:
        """Tell whether the last round is behind us."""
        return self.rounds is not None and self.rounds.over

    def look(self, batch: Call) -> None:
        """Take notice of a batch that the model trains on."""
        if self.rounds is not None:
            self.rounds.look(batch)

    def lift(self) -> None:
        """Take every hook off."""
        for pressure in self.pressures:
            pressure.remove()

    def remove(self) -> None:
        """Take every hook off for good."""
        self.lift()
        if self.distilled is not None:
            self.distilled.remove()

    def penalty(self) -> Tensor:
        """Sum up what the penalties add to the loss."""
        if not self.pressures and self.over:
            return self._nothing()
        if not self.pressures:
            raise PolicyError(
                "no rule has a penalty.",
                where=f"attach({type(self.model).__name__})",
                fix="write Layers(penalty='max_sliced') or Linearize(penalty='linearity').",
            )
        return torch.stack([pressure.penalty() for pressure in self.pressures]).sum()

    def distill(self, weight: float, *, temperature: float, match: Match) -> Tensor:
        """Say what distillation adds to the loss."""
        self._taught = True
        if self.distilled is not None:
            return self.distilled(weight, temperature=temperature, match=match)
        if self._pruned:
            raise CalibrationError(
                "no dense network was kept: nobody had asked for it before the first round.",
                where=f"Attached.distill, {type(self.model).__name__}",
                fix="call attached.distill() from the first step on: it is 0 until then.",
            )
        return self._nothing()

    def _nothing(self) -> Tensor:
        return torch.zeros((), device=next(self.model.parameters()).device)

    def tick(self) -> int:
        """Count one optimiser step; return the number of the round that is due, 0 for none."""
        for pressure in self.pressures:
            pressure.step()
        return 0 if self.rounds is None else self.rounds.advance()

    def prune_(self, number: int) -> Report | None:
        """Carry out a round, and keep the dense network where somebody asks for it."""
        assert self.rounds is not None
        wanted = self._taught and not self._pruned
        teacher = copied(self.model) if wanted else None  # before anything is gone
        with self._blind():
            report = self.rounds.prune_(number)
        if report is not None:
            self._pruned = True
            if teacher is not None:
                self.distilled = Distill(self.model, teacher)
        return report

    @contextmanager
    def _blind(self) -> Iterator[None]:
        """Let nobody ask the teacher: the model is run on calibration data."""
        if self.distilled is not None:
            self.distilled.active = False
        try:
            yield
        finally:
            if self.distilled is not None:
                self.distilled.active = True

    def rebind_(self, report: Report, optimizers: Sequence[Optimizes], ema: Any) -> None:
        """Let optimisers follow a round, or take the round back."""
        try:
            report.rebind_(*optimizers, ema=ema)
        except BaseException:  # all or nothing
            report.undo_()
            raise

    def back(self) -> None:
        """Make the last counted step undone: its round failed."""
        assert self.rounds is not None
        self.rounds.steps -= 1

    def state_dict(self) -> dict[str, Any]:
        """Write everything that training needs to go on."""
        teacher = self.distilled and self.distilled.teacher.state_dict()
        return {
            "policy": self.policy.to_json(),
            "rounds": self.rounds and self.rounds.state_dict(),
            "pressures": [pressure.state_dict() for pressure in self.pressures],
            "teacher": teacher,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote."""
        if Policy.from_json(state["policy"]) != self.policy:
            raise LoadError(
                "this state was written under another policy.",
                where=f"Attached.load_state_dict, {type(self.model).__name__}",
                fix="attach the policy that the checkpoint was made with.",
            )
        if self.rounds is not None:
            teacher = self._teacher(state["teacher"])
            self.rounds.load_state_dict(state["rounds"])
            self._pruned = bool(self.rounds.history)
            if teacher is not None:
                self.distilled = Distill(self.model, teacher)

    def _teacher(self, state: Mapping[str, Any] | None) -> nn.Module | None:
        if state is None:
            return None
        teacher = copied(self.model)
        try:
            teacher.load_state_dict(state)
        except RuntimeError as error:
            raise LoadError(
                "the state holds a dense teacher, and this model is not the dense one.",
                where=f"Attached.load_state_dict, {type(self.model).__name__}",
                fix="attach to the dense model; loading the state gives it its pruned shapes.",
            ) from error
        return teacher

    def resume(self, state: Mapping[str, Any]) -> None:
        """Let the penalties go on where they were, once they are at work again."""
        for pressure, known in zip(self.pressures, state["pressures"], strict=True):
            pressure.load_state_dict(known)
