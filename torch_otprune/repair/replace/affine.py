"""The layer in front writes what the block would have written as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from torch_otprune.plan.replacement import register
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.least_squares import LeastSquares
from torch_otprune.repair.reconstruct import Reconstruct
from torch_otprune.repair.replace.base import Fitted, hand_norms_, unmet

__all__ = ["Affine", "left_to_repair"]


@register
class Affine(Fitted):
    """Fit the last layer in front that writes to the stream to the stream behind the block.

    The best affine map of that layer's input onto what it and the removed blocks wrote together
    is again such a layer: nothing is added to the network. Where a layer-norm follows the
    addition, it takes over the scale of the norm behind the block.

    Limits: where no layer in front writes to the same stream, nothing stands in. Where a
    rectifier follows the addition, the layer can only add where the rectifier is on.

    Source: ReplaceMe (Shopkhoev et al. 2025) fits a map of the branch's output; the whole layer,
    with an intercept and with its own input as the features, is ours.
    """

    aims: ClassVar[bool] = True
    kind: Literal["affine"] = "affine"

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Refit the layers in front of the gaps, and these alone."""
        hand_norms_(patient)
        done = LeastSquares().refit_(patient, tuple(patient.aims), kind=self.kind)
        return (*done, *unmet(patient, self.kind))


def left_to_repair(replacement: object, repairs: Iterable[object]) -> bool:
    """Tell whether a repair fits what stands in for removed blocks, so that nobody else need.

    Args:
        replacement: of a rule.
        repairs: of the same rule.

    Returns:
        whether the layer in front of a gap is among those that a repair refits. The norm behind
        it must be handed over all the same.
    """
    return isinstance(replacement, Affine) and any(map(_refits, repairs))


def _refits(repair: object) -> bool:
    first = repair.least_squares if isinstance(repair, Reconstruct) else repair
    return isinstance(first, LeastSquares)
