"""Weights that a cut bakes in, because what computed them cannot compute the shorter ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.utils import parametrize

from torch_otprune.plan.model import Cut
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import cut_, merged, places
from torch_otprune.surgery.parametrised import Fixed, is_computed

__all__ = ["baked"]


def baked(model: nn.Module, cuts: Sequence[Cut]) -> Iterator[str]:
    """Say which weights lose what computes them, as a spectral norm.

    Costs the weights that are cut once more where any of them is computed.

    Args:
        model: the dense model.
        cuts: a plan's decisions.

    Yields:
        one clause for each weight.
    """
    touched = [(owner, name) for p in merged(cuts) for owner, name, _ in places(model, p)]
    if not any(is_computed(owner, name) for owner, name in touched):
        return
    small = copied(model, shared=True)
    cut_(small, cuts)
    for path, module in small.named_modules():
        before = _chains(model.get_submodule(path)) if path else _chains(model)
        for name, chain in _chains(module).items():
            if isinstance(chain, Fixed) and not isinstance(before[name], Fixed):
                how = " and ".join(type(s).__name__.lstrip("_") for s in before[name].children())
                whose = f"{path}.{name}".lstrip(".")
                yield (
                    f"{how} of '{whose}' cannot be kept: the weight is baked in as it is, and "
                    "trains on without it"
                )


def _chains(module: nn.Module) -> dict[str, nn.Module]:
    if not parametrize.is_parametrized(module):
        return {}
    table: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    return dict(table.items())
