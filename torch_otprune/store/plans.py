"""Which plan pruned which living model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from torch_otprune.errors import PlanError
from torch_otprune.plan.model import Plan
from torch_otprune.store.parts import Parts, describe, gathered, without
from torch_otprune.structure.fingerprint import layout
from torch_otprune.surgery.undo import Snapshot

__all__ = ["PLANS", "Known", "WayBack", "dense_of", "forget", "known_of", "plan_of", "remember"]

Layout = Mapping[str, str]  # name to shape and type


class Known(NamedTuple):
    """What is known of a dense model that is no more.

    Args:
        layout: name to shape and type of its tensors; empty where it is not known.
        parts: classes and plain attributes of its modules; None where they are not known.
    """

    layout: Layout = {}  # noqa: RUF012  # read only
    parts: Parts | None = None


PLANS: dict[int, tuple[weakref.ref[nn.Module], Plan, Known]] = {}
"""The plan of every living pruned model, by identity: the module itself carries no mark.

With it goes what the dense model was, which cannot be told from what is left of it.
"""


def remember(
    model: nn.Module, plan: Plan, dense: Layout | None = None, *, parts: Parts | None = None
) -> None:
    """Note that a model was pruned by a plan, for as long as the model lives.

    Args:
        model: the pruned model; a copy of it is not remembered.
        plan: what was carried out on it.
        dense: name to shape and type of the tensors it had before; None where not known.
        parts: classes and plain attributes of its modules before; None where not known.
    """
    key = id(model)
    known = Known(dense or {}, parts)
    PLANS[key] = (weakref.ref(model, lambda _: PLANS.pop(key, None)), plan, known)


def dense_of(plan: Plan, model: nn.Module | None = None) -> Known:
    """Look up what is known of the dense model that a plan was made for.

    Args:
        plan: what was carried out on a model that still lives, or on an equal one.
        model: the model in question.

    Returns:
        what is known: all of it of the model itself and of one that this very plan has pruned,
        only the tensors where no more than the layout is the same.
    """
    own = PLANS.get(id(model))
    if own is not None and own[0]() is model and own[1].fingerprint == plan.fingerprint:
        return own[2]
    found = [(other, known) for _, other, known in PLANS.values() if known.layout]
    exact = next((known for other, known in found if other is plan), None)
    alike = (known for other, known in found if other.fingerprint == plan.fingerprint)
    return exact or Known(next(alike, Known()).layout)


def forget(model: nn.Module) -> None:
    """Undo `remember`, when the model is dense again.

    Args:
        model: any module.
    """
    PLANS.pop(id(model), None)


def known_of(model: nn.Module) -> tuple[Plan, Known] | None:
    """Look up the plan that pruned a model, and what is known of it before.

    Args:
        model: any module.

    Returns:
        both; None if this object was not pruned or loaded in this process.
    """
    found = PLANS.get(id(model))
    return found[1:] if found is not None and found[0]() is model else None


def plan_of(model: nn.Module) -> Plan:
    """Look up the plan that pruned a model.

    Args:
        model: a pruned model.

    Returns:
        its plan.

    Raises:
        PlanError: if this object was not pruned or loaded in this process.
    """
    found = known_of(model)
    if found is None:
        raise PlanError(
            f"no plan is known for this {type(model).__name__}: it was not pruned in this "
            "process, was undone, or is a copy.",
            where="torch_otprune.store.plan_of",
            fix="pass the plan yourself: otp.save(model, directory, plan=report.plan).",
        )
    return found[0]


class WayBack:
    """What `report.undo_` calls: the model is restored, and with it the plan it had before.

    Making it remembers the new plan. Pickled, it is gone: it holds the dense tensors.

    Args:
        snapshot: the model before.
        plan: what was carried out on it.
        dense: a copy of the model before, on which it has run since.
    """

    def __init__(self, snapshot: Snapshot, plan: Plan, dense: nn.Module) -> None:
        self.snapshot, self.plan = snapshot, plan
        self.before = known_of(snapshot.model)
        # What running changes, as a count of calls, says nothing about the factory.
        parts = without(describe(dense), gathered(snapshot.modules()))
        self.known = Known(layout(dense), parts)
        self.whole = plan
        remember(snapshot.model, plan, self.known.layout, parts=parts)

    def lengthen(self, whole: Plan, known: Known) -> None:
        """Remember a plan that starts from an earlier dense model and leads to the same end.

        Args:
            whole: that plan; a model that is saved goes by it.
            known: of the dense model that it starts from.
        """
        self.whole = whole
        remember(self.snapshot.model, whole, known.layout, parts=known.parts)

    def __call__(self) -> None:
        """Restore the model.

        Raises:
            PlanError: if the model was pruned again since.
        """
        self.check("Report.undo_")
        self.snapshot.restore_()
        forget(self.snapshot.model)
        if self.before is not None:
            plan, known = self.before
            remember(self.snapshot.model, plan, known.layout, parts=known.parts)

    def check(self, where: str) -> None:
        """Make sure that this is the last pruning.

        Args:
            where: what to name in the error.

        Raises:
            PlanError: if the model was pruned again since.
        """
        found = known_of(self.snapshot.model)
        if found is not None and found[0] is not self.whole:
            raise PlanError(
                "the model was pruned again since.",
                where=where,
                fix="undo the later pruning first.",
            )

    def save(self, directory: str | Path, *, shard: str | int = "1GB") -> Path:
        """Write the way back to disk.

        Args:
            directory: new, empty, or an earlier one of its kind, which is replaced.
            shard: size above which the tensors are split into several files.

        Returns:
            the directory.
        """
        from torch_otprune.store.undo import save_undo

        return save_undo(self, Path(directory), shard=shard)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
