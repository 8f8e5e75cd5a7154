"""The layer in front writes what the block would have written as well."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch_otprune.plan.replacement import Replacement, register

__all__ = ["Affine"]


@register
class Affine(Replacement):
    """Fit the last layer in front that writes to the stream to the stream behind the block.

    The best affine map of that layer's input onto what it and the removed blocks wrote together
    is again such a layer: nothing is added to the network. It is fitted by the repair
    `least_squares`, sequentially with all others, and alone where the rule names no such repair.

    Limits: where no layer in front writes to the same stream, nothing stands in.

    Source: ReplaceMe (Shopkhoev et al. 2025) fits a map of the branch's output; the whole layer,
    with an intercept and with its own input as the features, is ours.
    """

    aims: ClassVar[bool] = True
    kind: Literal["affine"] = "affine"
