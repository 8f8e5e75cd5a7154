"""A model as a function of named tensors, which is all that an exported file knows."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.structure.forward import Call, map_tensors

__all__ = ["Door", "door_of", "fresh", "plain", "resized", "servable", "tensors_of"]


class Door(nn.Module):
    """A model whose arguments have names and whose results are plain tensors.

    Args:
        model: what is called.
        positional: names of its positional arguments.
        fixed: keyword arguments without any tensor; they become constants.
    """

    def __init__(
        self, model: nn.Module, positional: tuple[str, ...], fixed: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model, self.positional, self.fixed = model, positional, dict(fixed)

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model and write its result as tensors.

        Args:
            args: values of the first names.
            kwargs: values of the others.

        Returns:
            a tensor, a tuple of tensors, or a dict of named ones.
        """
        given = {**self.fixed, **self.named(Call(args, dict(kwargs)))}
        leading = [given.pop(name) for name in self.positional]
        return plain(self.model(*leading, **given))

    def named(self, call: Call) -> dict[str, Any]:
        """Write a call of the door by names.

        Args:
            call: as `split` gives it.

        Returns:
            name to value.
        """
        return {**dict(zip(self.positional, call.args, strict=False)), **call.kwargs}

    def split(self, call: Call) -> Call:
        """Write a call of the model as one of the door.

        Args:
            call: of the model.

        Returns:
            the same without what is fixed; behind that, by keyword.
        """
        given = {**dict(zip(self.positional, call.args, strict=True)), **call.kwargs}
        until = next((i for i, n in enumerate(self.positional) if n in self.fixed), None)
        leading = self.positional[:until]
        rest = {n: v for n, v in given.items() if n not in {*leading, *self.fixed}}
        return Call(tuple(given[n] for n in leading), rest)


def door_of(model: nn.Module, call: Call) -> tuple[Door, Call]:
    """Put a door before a model, shaped by one call.

    torch.export reads names and dynamic axes off the signature, and loses both where that says
    `*args` or `**kwargs`; so the door has the signature of this very call.

    Args:
        model: the model.
        call: how it is called.

    Returns:
        the door, in evaluation mode, and the call of it.
    """
    positional = tuple(_names(model, len(call.args)))
    given = {**dict(zip(positional, call.args, strict=True)), **call.kwargs}
    fixed = {name: value for name, value in given.items() if not tensors_of(value)}

    def forward(self: Door, *args: Any, **kwargs: Any) -> Any:
        return self.enter(args, kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ("self", *(name for name in given if name not in fixed))
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    made: type[Door] = type("Door", (Door,), {"forward": forward})
    door = made(model, positional, fixed).eval()
    return door, door.split(call)


def _names(model: nn.Module, count: int) -> Iterator[str]:
    """Name the first arguments of a model's forward."""
    for place, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            yield from (f"{parameter.name}_{i}" for i in range(count - place))
            return
        if place == count:
            return
        yield parameter.name


def plain(out: Any) -> Any:
    """Write a model's result without the types of the library that it comes from.

    Args:
        out: a tensor, a tuple, a Transformers `ModelOutput`, a dataclass, or any of these nested.

    Returns:
        a tensor as it is; a tuple of tensors; else a dict from name to tensor, such as
        `hidden_states_0`. What holds no tensor, as a cache does, is left out.
    """
    if isinstance(out, Tensor):
        return out
    if isinstance(out, (tuple, list)) and all(isinstance(part, Tensor) for part in out):
        return tuple(out)
    return tensors_of(out, "output")


def tensors_of(tree: Any, name: str = "") -> dict[str, Tensor]:
    """Name the tensors of a nested value in order.

    Args:
        tree: any value.
        name: what the names begin with where no key gives one.

    Returns:
        name to tensor.
    """
    if isinstance(tree, Tensor):
        return {name: tree}
    found: dict[str, Tensor] = {}
    for key, value in _parts(tree):
        # Keys of the top level need no prefix: they are the names that users know.
        own = key if name in {"", "output"} and not key.isdigit() else f"{name}_{key}".strip("_")
        found |= tensors_of(value, own)
    return found


def _parts(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, Call):
        return [*_parts(list(tree.args)), *tree.kwargs.items()]
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items()]
    if isinstance(tree, (tuple, list)):
        return [(str(i), value) for i, value in enumerate(tree)]
    return list(vars(tree).items()) if hasattr(tree, "__dataclass_fields__") else []


def resized(call: Call, size: int, *, batch: int) -> Call:
    """Repeat or drop samples until a call has so many.

    Args:
        call: a call with `batch` samples.
        size: samples wanted.
        batch: samples there are; tensors whose first axis is not so long stay whole.

    Returns:
        the call.
    """
    rows = torch.arange(size) % batch

    def take(tensor: Tensor) -> Tensor:
        batched = bool(tensor.dim()) and len(tensor) == batch
        return tensor[rows.to(tensor.device)] if batched else tensor

    out: Call = map_tensors(call, take)
    return out


def fresh(call: Call, generator: torch.Generator) -> Call:
    """Draw other values that are as valid as those of a call.

    Args:
        call: any call.
        generator: where they come from.

    Returns:
        the same shapes and types: numbers in another order, other identifiers between the
        smallest and the largest; masks of zeros and ones stay what they are.
    """

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            flat = tensor.flatten()[order]
            if bool((flat == flat[0]).all()):  # no order can change it
                flat = torch.randn(len(flat), generator=generator).to(flat)
            return torch.empty_like(tensor).copy_(flat.view(tensor.shape))  # strides stay
        if tensor.dtype == torch.bool or int(tensor.max()) <= 1:
            return tensor
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)

    out: Call = map_tensors(call, draw)
    return out


# Caches are no tensors; the default for experts is an op that only Transformers knows.
_SERVED = {"use_cache": False, "_experts_implementation_internal": "batched_mm"}


@contextmanager
def servable(model: nn.Module) -> Iterator[None]:
    """Set a Transformers model so that it can be written down, and back.

    Args:
        model: any model.

    Yields:
        nothing.
    """
    library: Any = sys.modules.get("transformers")  # not loaded: the model is none of its own
    kind = getattr(library, "PreTrainedModel", ())
    inner = [module for module in model.modules() if isinstance(module, kind)]
    configs = {id(module.config): module.config for module in inner}.values()
    before = [(config, dict(vars(config))) for config in configs]
    try:
        for config, fields in before:
            vars(config).update({k: v for k, v in _SERVED.items() if k in fields})
        yield
    finally:
        for config, fields in before:
            vars(config).update({k: fields[k] for k in _SERVED if k in fields})
