"""Everything the package raises on purpose."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CalibrationError",
    "LoadError",
    "OTPruneError",
    "PlanError",
    "PolicyError",
    "RepairError",
    "StructureError",
    "TargetError",
    "TransportError",
    "VerificationError",
]


class OTPruneError(Exception):
    """Say what is wrong, where, and what to do about it, in three lines.

    Args:
        problem: what is wrong, with the offending value.
        where: policy field, module path, shapes.
        fix: one imperative sentence.

    Example:
        >>> print(OTPruneError("keep is 0.", where="Budget.macs", fix="keep more than 0 %."))
        keep is 0.
          where: Budget.macs
          fix:   keep more than 0 %.
    """

    def __init__(self, problem: str, *, where: str, fix: str) -> None:
        super().__init__(problem, where, fix)
        self.problem, self.where, self.fix = problem, where, fix

    def __str__(self) -> str:
        return f"{self.problem}\n  where: {self.where}\n  fix:   {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling, which loses keyword arguments otherwise."""
        return _rebuild, (type(self), self.problem, self.where, self.fix)


def _rebuild(kind: type[OTPruneError], problem: str, where: str, fix: str) -> OTPruneError:
    return kind(problem, where=where, fix=fix)


class PolicyError(OTPruneError):
    """A declaration that cannot be read or that contradicts itself."""


class TargetError(PolicyError):
    """A target that matches nothing, or two that tie."""


class BudgetError(OTPruneError):
    """A budget that cannot be met, or is no budget."""


class StructureError(OTPruneError):
    """A model that cannot be analysed, or a group that cannot be cut."""


class CalibrationError(OTPruneError):
    """Data that is missing, malformed or not finite."""


class TransportError(OTPruneError):
    """A transport problem that has no answer, or not to the asked accuracy."""


class PlanError(OTPruneError):
    """A plan that does not belong to this model."""


class RepairError(OTPruneError):
    """A repair that cannot be carried out."""


class VerificationError(OTPruneError):
    """A smaller model that does not compute what it should."""


class LoadError(OTPruneError):
    """A saved model that cannot be read, or not with this factory."""
