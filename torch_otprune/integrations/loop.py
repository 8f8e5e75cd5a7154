"""What the callbacks of all training libraries have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from torch_otprune.attach import Attached, attach
from torch_otprune.errors import OTPruneError, StructureError
from torch_otprune.plan.gated import learning
from torch_otprune.policy import Policy
from torch_otprune.report import Report
from torch_otprune.surgery.rebind import Optimizes

__all__ = ["Loop", "check_alone"]


class Loop:
    """A policy with a schedule, inside somebody else's training loop.

    Args:
        policy: with a schedule; None takes the one on the class of what is pruned.
        part: path of the module to prune, from the model that the library trains; the model
            itself if empty. It must be called as a module by the training step.
        data: what the rounds decide and repair on; None takes what the module trained on last.
        example: one batch to analyse the module on; needed where a rule has a penalty or
            criterion `dtp`, whose masks the callback trains: `ended.plan()` is what they come to.
        ema: averaged copies of the module that follow every round.

    Attributes:
        attached: the handle while training runs, for `penalty()` and `distill()`.
        ended: the handle behind it, which knows how far the schedule came.
        reports: of the rounds so far.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        part: str = "",
        data: Any = None,
        example: Any = None,
        ema: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.policy, self.part, self.data, self.example = policy, part, data, example
        self.ema = tuple(ema)
        self.attached: Attached | None = None
        self.ended: Attached | None = None
        self.reports: list[Report] = []

    def begin(self, model: nn.Module) -> Attached:
        """Attach, once.

        Args:
            model: that the library trains.

        Returns:
            the handle.

        Raises:
            OTPruneError: if the policy has no schedule.
            StructureError: if the part is not there, or cannot be pruned.
        """
        if self.attached is not None:
            return self.attached
        try:
            module = model.get_submodule(self.part)
        except AttributeError as error:
            raise StructureError(
                f"{self.part!r} is no module of this model.",
                where=f"PruningCallback.part, {type(model).__name__}",
                fix="write a path as in named_modules(), or leave part out.",
            ) from error
        attached = attach(module, self.policy, example=self.example, data=self.data)
        if attached.policy.schedule is None and not learning(attached.policy):
            attached.remove()
            raise OTPruneError(
                "this policy has no schedule: the callback would never prune.",
                where="PruningCallback.policy",
                fix="write Policy(..., schedule=otp.Schedule(at=[500])).",
            )
        self.attached = attached
        return attached

    def tick(self, optimizers: Sequence[Optimizes]) -> Report | None:
        """Count one optimiser step, and prune where a round is due.

        Args:
            optimizers: those of the library.

        Returns:
            the report of a round.
        """
        assert self.attached is not None
        report = self.attached.step(*optimizers, ema=self.ema)
        if report is not None:
            self.reports.append(report)
        return report

    def end(self, error: BaseException | None = None) -> None:
        """Take the hooks off.

        Args:
            error: that ends the training, if one does; without it rounds left over are warned of.
        """
        if self.attached is not None:
            self.ended = self.attached
            self.attached.__exit__(type(error) if error else None, error, None)
        self.attached = None


def check_alone(processes: int, where: str) -> None:
    """Refuse several processes: what wraps the model for them would not follow.

    Args:
        processes: how many train together.
        where: for the error.

    Raises:
        StructureError: if there are several.
    """
    if processes > 1:
        raise StructureError(
            f"{processes} processes train together: their wrapper would not follow a pruning.",
            where=where,
            fix="train in one process, or prune between two trainings and wrap the model anew.",
        )
