"""The layer in front of an activation: whether it can take up a line in the activation's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from torch_otprune.fold.chains import Layer
from torch_otprune.fold.modules import POOLS

__all__ = ["Front", "fronts"]


@dataclass(frozen=True)
class Front:
    """What stands before an activation.

    Args:
        path: the layer whose output the activation alone reads; None where there is none.
        reason: why it cannot take up a line; empty where it can.
        stuck: whether the activation itself must stay.
    """

    path: str | None = None
    reason: str = ""
    stuck: bool = False

    @property
    def ready(self) -> bool:
        """Tell whether a line can be taken up."""
        return self.path is not None and not self.reason


def fronts(chains: Iterable[tuple[Layer, ...]], surrogates: Mapping[str, str]) -> dict[str, Front]:
    """Find what stands in front of activations.

    Args:
        chains: rows of layers.
        surrogates: activation to the kind of line that it would leave.

    Returns:
        one front per activation; one that is in no chain has none.
    """
    nothing = Front(reason="no layer that could take up a line writes for it alone")
    found = dict.fromkeys(surrogates, nothing)
    for chain in chains:
        for before, layer in zip((None, *chain), chain, strict=False):
            if layer.path in surrogates:
                found[layer.path] = _front(before, layer, surrogates[layer.path])
    return found


def _front(before: Layer | None, layer: Layer, surrogate: str) -> Front:
    if layer.kind == "stuck":
        return Front(reason=layer.reason, stuck=True)
    if before is None:
        return Front(reason="no layer that could take up a line writes for it alone")
    if before.kind == "stuck":
        return Front(reason=f"'{before.path}' in front of it must stay as it is: {before.reason}")
    if before.kind == "activation":
        return Front(reason=f"'{before.path}' in front of it is no linear layer")
    return Front(before.path, _refusal(before.module, surrogate))


def _refusal(module: nn.Module, surrogate: str) -> str:
    """Say why a layer takes up no line of this kind."""
    if surrogate == "identity":
        return ""
    if isinstance(module, POOLS):
        return "an average pooling in front of it has no weights to take up a line"
    if isinstance(module, nn.RMSNorm) and surrogate == "affine":
        return "the RMSNorm in front of it has no shift to take up a line"
    return ""
