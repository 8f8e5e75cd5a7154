"""What trains and averages a pruned model follows it, and comes back with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim.swa_utils import AveragedModel

from torch_otprune.errors import OTPruneError
from torch_otprune.plan.model import Plan
from torch_otprune.store.carry import carry_
from torch_otprune.structure.fingerprint import fingerprint
from torch_otprune.surgery import Lineage, Snapshot
from torch_otprune.surgery.rebind import Draft, Optimizes, Rebound, draft

__all__ = ["Rebinding"]


class Rebinding:
    """Carry optimisers and averaged copies over one pruning, and back when it is undone.

    Pickled, it is gone: it holds the user's objects.

    Args:
        lineage: settled, of the pruned model.
        plan: what was carried out.
    """

    def __init__(self, lineage: Lineage, plan: Plan) -> None:
        self.lineage, self.plan = lineage, plan
        self._backs: dict[int, Draft] = {}
        self._copies: dict[int, Snapshot] = {}

    def __call__(self, optimizers: Sequence[Optimizes], copies: Sequence[nn.Module]) -> Rebound:
        """Do it, all or nothing.

        Args:
            optimizers: that train the model.
            copies: averages of the dense model.

        Returns:
            what was done.

        Raises:
            OTPruneError: if an optimiser or a copy is of another model, or the model was pruned
                again since.
        """
        self._check_current()
        drafts = draft(self.lineage, optimizers)
        backs = [made.back() for made in drafts]
        pruned = self._pruned([_inner(copy) for copy in copies])
        for made, back in zip(drafts, backs, strict=True):
            made.write_()
            self._backs.setdefault(id(made.optimizer), back)
        self._copies.update(pruned)
        said = {
            key: tuple(line for made in drafts for line in made.said.get(key, ()))
            for key in ("sliced", "reset", "left", "joined")
        }
        return Rebound(copies=len(pruned), **said)

    def release_(self) -> None:
        """Bring back what followed: parameters and state of optimisers, and copies.

        Learning rates and other options of the groups stay as they are now.
        """
        for snapshot in self._copies.values():
            snapshot.restore_()
        for back in self._backs.values():
            back.write_()
        self._copies.clear()
        self._backs.clear()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def _check_current(self) -> None:
        alive = {id(p) for p in self.lineage.model.parameters()}
        for heir in self.lineage.heirs:
            shape = list(heir.shape)
            for axis, keep in (heir.keeps or {}).items():
                shape[axis] = len(keep)
            lasting = heir.keeps is None or tuple(shape) == tuple(heir.parameter.shape)
            if id(heir.parameter) not in alive or not lasting:
                raise OTPruneError(
                    "the model was pruned again since.",
                    where=f"Report.rebind_, '{heir.name}'",
                    fix="call rebind_ on each report before the next pruning.",
                )

    def _pruned(self, copies: Sequence[nn.Module]) -> dict[int, Snapshot]:
        """Prune the copies too; their average starts again from the repaired model."""
        done: dict[int, Snapshot] = {}
        state = {k: v.detach() for k, v in self.lineage.model.state_dict().items()}
        try:
            for copy in copies:
                _check_copy(copy, self.plan)
                done[id(copy)] = Snapshot(copy)
                carry_(copy, self.plan)
                copy.load_state_dict(state)
        except BaseException:  # all or nothing
            for snapshot in done.values():
                snapshot.restore_()
            raise
        return done


def _inner(copy: nn.Module) -> nn.Module:
    return copy.module if isinstance(copy, AveragedModel) else copy


def _check_copy(copy: nn.Module, plan: Plan) -> None:
    if not isinstance(copy, nn.Module) or fingerprint(copy) != plan.fingerprint:
        raise OTPruneError(
            "this average is no copy of the dense model.",
            where=f"Report.rebind_, ema of type {type(copy).__name__}",
            fix="pass an AveragedModel, or a deep copy, that was made before the pruning.",
        )
