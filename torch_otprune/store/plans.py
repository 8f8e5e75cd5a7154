"""Which plan pruned which living model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn

from torch_otprune.errors import PlanError
from torch_otprune.plan.model import Plan
from torch_otprune.surgery.undo import Snapshot

__all__ = ["PLANS", "WayBack", "dense_of", "forget", "plan_of", "remember"]

Layout = Mapping[str, str]  # name to shape and type

PLANS: dict[int, tuple[weakref.ref[nn.Module], Plan, Layout]] = {}
"""The plan of every living pruned model, by identity: the module itself carries no mark.

With it goes the layout of the dense model, which cannot be told from what is left of it.
"""


def remember(model: nn.Module, plan: Plan, dense: Layout | None = None) -> None:
    """Note that a model was pruned by a plan, for as long as the model lives.

    Args:
        model: the pruned model; a copy of it is not remembered.
        plan: what was carried out on it.
        dense: name to shape and type of the tensors it had before; None where not known.
    """
    key = id(model)
    PLANS[key] = (weakref.ref(model, lambda _: PLANS.pop(key, None)), plan, dense or {})


def dense_of(plan: Plan) -> dict[str, str]:
    """Look up the layout of the dense model that a plan was made for.

    Args:
        plan: what was carried out on a model that still lives, or on an equal one.

    Returns:
        name to shape and type; empty where it is not known.
    """
    known = (dense for _, other, dense in PLANS.values() if other.fingerprint == plan.fingerprint)
    return dict(next(filter(None, known), {}))


def forget(model: nn.Module) -> None:
    """Undo `remember`, when the model is dense again.

    Args:
        model: any module.
    """
    PLANS.pop(id(model), None)


def plan_of(model: nn.Module) -> Plan:
    """Look up the plan that pruned a model.

    Args:
        model: a pruned model.

    Returns:
        its plan.

    Raises:
        PlanError: if this object was not pruned or loaded in this process.
    """
    found = PLANS.get(id(model))
    if found is None or found[0]() is not model:
        raise PlanError(
            f"no plan is known for this {type(model).__name__}: it was not pruned in this "
            "process, was undone, or is a copy.",
            where="torch_otprune.store.plan_of",
            fix="pass the plan yourself: otp.save(model, directory, plan=report.plan).",
        )
    return found[1]


class WayBack:
    """What `report.undo_` calls: the model is restored, and with it the plan it had before.

    Making it remembers the new plan. Pickled, it is gone: it holds the dense tensors.

    Args:
        snapshot: the model before.
        plan: what was carried out on it.
        dense: name to shape and type of the model's tensors before.
    """

    def __init__(self, snapshot: Snapshot, plan: Plan, dense: Layout) -> None:
        self.snapshot, self.plan = snapshot, plan
        found = PLANS.get(id(snapshot.model))
        self.before = found[1:] if found is not None and found[0]() is snapshot.model else None
        remember(snapshot.model, plan, dense)

    def __call__(self) -> None:
        """Restore the model.

        Raises:
            PlanError: if the model was pruned again since.
        """
        found = PLANS.get(id(self.snapshot.model))
        if found is not None and found[1] is not self.plan:
            raise PlanError(
                "the model was pruned again since.",
                where="Report.undo_",
                fix="undo the later pruning first.",
            )
        self.snapshot.restore_()
        forget(self.snapshot.model)
        if self.before is not None:
            remember(self.snapshot.model, *self.before)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
