"""What an attached policy does while somebody trains: penalties, rounds, and distillation."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.attach.masked import Masked
from torch_otprune.attach.pressures import pressures
from torch_otprune.attach.rounds import Rounds
from torch_otprune.criteria.masks import UNTRAINED
from torch_otprune.errors import CalibrationError, LoadError, PolicyError
from torch_otprune.plan.gated import learning
from torch_otprune.plan.model import Plan
from torch_otprune.policy import Policy
from torch_otprune.report import Report
from torch_otprune.statistics import Observation
from torch_otprune.structure import Call, Graph
from torch_otprune.surgery import copied
from torch_otprune.surgery.rebind import Optimizes
from torch_otprune.training import Distill, Pressure
from torch_otprune.training.distill import Match, check_terms

__all__ = ["Course"]

_STATE = ("policy", "rounds", "pressures", "teacher")


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
        self.masked: Masked | None = None
        self.distilled: Distill | None = None
        self._stepped = self._removed = False
        self._taught = False  # somebody asks for the teacher
        self._pruned = False
        self._before: tuple[bool, Distill | None] = False, None  # the last round

    def press(self, graph: Graph | None, example: Any) -> None:
        """Put the rules' masks and penalties to work on a model that was just analysed.

        Penalties of an earlier round go on where they were; behind the last round there are none.

        Args:
            graph: the analysis; None where the policy needs none.
            example: what it ran on.
        """
        if graph is not None and learning(self.policy):
            self.masked = self.masked or Masked(self.model, self.policy, graph, example)
            self.masked.gates.hook()
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
        return bool(self.pressures) or self.rounds is not None or self.masked is not None

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
        if self.masked is not None:
            self.masked.gates.remove()

    def remove(self, *, failed: bool = False) -> None:
        """Take every hook off for good, and say so where rounds are left.

        Args:
            failed: whether that is because of an error, which says enough.
        """
        if not (failed or self._removed):
            self._warn()
        self._removed = True
        self.lift()
        if self.distilled is not None:
            self.distilled.remove()

    def _warn(self) -> None:
        """Tell who stopped training too early that the model is not done."""
        if self.masked is not None and self.masked.open:
            search = self.masked.search
            warnings.warn(
                f"the search of dtp stops at step {search.taken} of {search.setting.steps}: its "
                "masks are soft, and nothing is decided; train on, or call harden() before.",
                stacklevel=4,
            )
        rounds = self.rounds
        if rounds is None or rounds.over or not self._stepped:  # then it was only looked at
            return
        done, left = bisect_right(rounds.due, rounds.steps), rounds.due[-1] - rounds.steps
        what = "the policy's keep and drop are" if self.policy.budget is None else "the budget is"
        warnings.warn(
            f"pruning stops behind {done} of {len(rounds.due)} rounds: {what} not met; train "
            f"on (steps left: {left}), or end the schedule earlier.",
            stacklevel=4,
        )

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
        check_terms(weight, temperature, match)
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
        self._check_step()
        self._stepped = True
        for pressure in self.pressures:
            pressure.step()
        if self.masked is not None:
            self.masked.step()
        return 0 if self.rounds is None else self.rounds.advance()

    def _check_step(self) -> None:
        """Refuse to count steps that can lead to nothing."""
        where = f"Attached.step, {type(self.model).__name__}"
        if self._removed:
            raise PolicyError(
                "the policy was removed: step would never prune.",
                where=where,
                fix="call step before remove, inside the `with` block; or attach again.",
            )
        if learning(self.policy) and self.masked is None:
            raise self._no_example("Attached.step")
        if self.rounds is None and not self.trains:
            raise PolicyError(
                "this policy has no schedule and no penalty: step would never prune.",
                where=where,
                fix="write Policy(..., schedule=otp.Schedule(at=[500])), or leave step out and "
                "call attached.plan() and otp.apply_.",
            )

    def _no_example(self, asked: str) -> PolicyError:
        return PolicyError(
            "criterion 'dtp' trains masks from the first step on, and no example was given.",
            where=f"{asked}, {type(self.model).__name__}",
            fix="pass example= to attach, one batch as the model takes it.",
        )

    def harden(self) -> None:
        """End the search of masks now."""
        if self.masked is None:
            raise PolicyError(
                "no rule trains masks.",
                where=f"Attached.harden, {type(self.model).__name__}",
                fix="give a rule criterion='dtp', and pass example= to attach.",
            )
        self.masked.harden()

    def told(self, observation: Observation) -> Observation:
        """Add what training decided to what calibration found."""
        return observation if self.masked is None else self.masked.told(observation)

    def signed(self, plan: Plan) -> Plan:
        """Say in a plan of zeros how their masks came about; cuts and drops have said it."""
        if not plan.thinned or not learning(self.policy):
            return plan
        note = UNTRAINED if self.masked is None else self.masked.search.note
        return plan.model_copy(update={"notes": (*plan.notes, note)})

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run the model without masks."""
        with nullcontext() if self.masked is None else self.masked.off():
            yield

    def round_(self, number: int, optimizers: Sequence[Optimizes], ema: Any) -> Report | None:
        """Carry out a round, and let optimisers and averages follow; if that fails, it stays due.

        Args:
            number: of the round, from 1.
            optimizers: that train the model; none leaves that to the user.
            ema: averaged copies.

        Returns:
            the report; None where nothing was to go.
        """
        assert self.rounds is not None
        try:
            report = self._prune_(number)
            if report is not None and (optimizers or ema):
                self._rebind_(report, optimizers, ema)
        except BaseException:  # whatever it was, the model is as it was before
            self.rounds.steps -= 1
            raise
        return report

    def _prune_(self, number: int) -> Report | None:
        """Carry out a round, and keep the dense network where somebody asks for it."""
        assert self.rounds is not None
        wanted = self._taught and not self._pruned
        self._before = self._pruned, self.distilled
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

    def _rebind_(self, report: Report, optimizers: Sequence[Optimizes], ema: Any) -> None:
        """Let optimisers follow a round, or take the round back."""
        try:
            report.rebind_(*optimizers, ema=ema)
        except BaseException:  # all or nothing
            report.undo_()
            self._unlearn()
            raise

    def _unlearn(self) -> None:
        """Let go of a teacher that came with the round that was taken back."""
        pruned, distilled = self._before
        if self.distilled is not None and distilled is None:
            self.distilled.remove()
        self._pruned, self.distilled = pruned, distilled

    def state_dict(self) -> dict[str, Any]:
        """Write everything that training needs to go on."""
        teacher = self.distilled and self.distilled.teacher.state_dict()
        return {
            "policy": self.policy.to_json(),
            "rounds": self.rounds and self.rounds.state_dict(),
            "pressures": [pressure.state_dict() for pressure in self.pressures],
            "masks": self.masked and self.masked.state_dict(),
            "teacher": teacher,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote."""
        told = state if isinstance(state, Mapping) else {}
        if missing := [key for key in _STATE if key not in told]:
            raise LoadError(
                f"this is no state of an attached policy: it has no '{missing[0]}'.",
                where=f"Attached.load_state_dict, {type(self.model).__name__}",
                fix="pass what attached.state_dict() returned, not the model's state.",
            )
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
        """Let penalties and masks go on where they were, once they are at work again."""
        if (masks := state.get("masks")) is not None:
            if self.masked is None:
                raise self._no_example("Attached.load_state_dict")
            self.masked.load_state_dict(masks)
        for pressure, known in zip(self.pressures, state["pressures"], strict=True):
            pressure.load_state_dict(known)
