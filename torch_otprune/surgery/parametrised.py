"""Weights that a parametrisation computes: weight-norm, spectral norm and their kin."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Fixed", "held", "hold_", "is_computed"]


class Fixed(nn.Module):
    """A weight that was computed once and is a parameter from now on.

    Args:
        value: the weight.
        learns: whether it takes gradients.
    """

    def __init__(self, value: Tensor, *, learns: bool) -> None:
        super().__init__()
        self.original = nn.Parameter(value.detach().clone(), requires_grad=learns)

    def forward(self) -> Tensor:
        """Give the weight."""
        return self.original


def is_computed(module: nn.Module, name: str) -> bool:
    """Tell whether a parametrisation computes a module's tensor.

    Args:
        module: any module.
        name: of the tensor.

    Returns:
        whether it does.
    """
    return parametrize.is_parametrized(module, name)


def held(module: nn.Module, name: str) -> Tensor | nn.Module:
    """Read what a module holds under a name, to put it back later.

    Args:
        module: any module.
        name: of a tensor.

    Returns:
        the tensor, or what computes it.
    """
    if is_computed(module, name):
        table: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
        return table[name]
    value: Tensor = getattr(module, name)
    return value


def hold_(module: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    """Let what computes a tensor compute another one.

    A weight-norm keeps its form: direction and length are those of the new weight. Where the
    form cannot be kept, as a spectral norm that would divide again, the weight is baked in.

    Args:
        module: one whose tensor is computed.
        name: of the tensor.
        value: the new weight, or what computed it before.
    """
    table: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    if isinstance(value, nn.Module):
        table._modules[name] = value
        return
    chain = table[name]
    learns = any(p.requires_grad for p in chain.parameters())
    fitted = _refitted(chain, value) if isinstance(chain, parametrize.ParametrizationList) else None
    table._modules[name] = Fixed(value, learns=learns) if fitted is None else fitted


@torch.no_grad()
def _refitted(chain: parametrize.ParametrizationList, value: Tensor) -> nn.Module | None:
    """Copy what computes a weight so that it computes another; None where it cannot."""
    wanted: Tensor | Sequence[Tensor] = value
    try:
        for step in reversed(chain):
            wanted = step.right_inverse(wanted)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None
    originals = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    fitted = copy.deepcopy(chain).eval()  # a spectral norm that trains would iterate meanwhile
    names = ["original"] if isinstance(wanted, Tensor) else list(_names(len(originals)))
    for key, tensor in zip(names, originals, strict=True):
        old = fitted._parameters.get(key)
        learns = old is not None and old.requires_grad
        fitted._parameters[key] = nn.Parameter(tensor.detach().clone(), requires_grad=learns)
    try:
        made = fitted()
    except RuntimeError:
        return None
    near = made.shape == value.shape and torch.allclose(made, value, rtol=1e-5, atol=1e-6)
    return fitted.train(chain.training) if near else None


def _names(count: int) -> list[str]:
    return [f"original{i}" for i in range(count)]
