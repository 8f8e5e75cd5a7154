"""What is stored of a model besides its plan: tensors once, and how they belong to modules."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_otprune.errors import LoadError
from torch_otprune.store.parts import read
from torch_otprune.store.tensors import storable

__all__ = ["State", "check_storable", "identity", "state_of", "transient"]

_PLAIN: Any = {"device": "meta", "memory_format": torch.contiguous_format}


@dataclass(frozen=True)
class State:
    """The tensors and flags of a model at one moment; tensors are the model's own, not copies.

    Args:
        named: every tensor by every name, buffers outside the `state_dict` included.
        transient: names of those buffers.
        frozen: parameters without gradient.
        training: flag of every module.
        extra: states that are no tensors.
    """

    named: Mapping[str, Tensor]
    transient: tuple[str, ...]
    frozen: tuple[str, ...]
    training: Mapping[str, bool]
    extra: Mapping[str, str]

    def unique(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Take every tensor once, and list the further names of tied ones."""
        first: dict[object, str] = {}
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        for name, value in self.named.items():
            stored = first.setdefault(identity(value), name)
            if stored != name:
                aliases[name] = stored
            else:
                tensors[name] = value
        return tensors, aliases

    def page(self, aliases: Mapping[str, str]) -> dict[str, Any]:
        """Describe it as a page does."""
        flags, whole = self.training, self.training[""]
        return {
            "aliases": dict(aliases),
            "strides": _strides(self.named, aliases),
            "transient": self.transient,
            "pairs": tuple(n for n, t in self.named.items() if t.dtype is torch.complex128),
            "extra": dict(self.extra),
            "frozen": self.frozen,
            "training": whole,
            "exceptions": tuple(path for path, flag in flags.items() if flag != whole),
            "versions": _versions(),
        }


def transient(model: nn.Module, state: Iterable[str]) -> dict[str, Tensor]:
    """List the buffers outside the state_dict: a factory may fill them at random.

    Args:
        model: any module.
        state: the names in its `state_dict`.

    Returns:
        name to buffer.
    """
    inside = set(state)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in buffers if name not in inside}


def state_of(model: nn.Module) -> State:
    """Gather what is stored of a model.

    Args:
        model: any module; left as it was.

    Returns:
        its state.

    Raises:
        LoadError: if something in it can be stored by pickle only.
    """
    state = model.state_dict(keep_vars=True)
    named, extra = dict[str, Tensor](), dict[str, str]()
    outside = transient(model, state)
    for name, value in {**state, **outside}.items():
        if not isinstance(value, Tensor) and (text := _literal(value)) is not None:
            extra[name] = text
        else:
            check_storable(name, value, where="otp.save")
            named[name] = value
    frozen = (n for n, p in model.named_parameters() if not p.requires_grad)
    flags = {path: module.training for path, module in model.named_modules()}
    return State(named, tuple(outside), tuple(frozen), flags, extra)


def check_storable(name: str, value: object, *, where: str) -> None:
    """Refuse what only pickle could hold.

    Args:
        name: of the value in its model.
        value: an entry of a `state_dict`, or a buffer.
        where: what to name in the error.

    Raises:
        LoadError: if it is no dense tensor of a type that the format knows.
    """
    if (reason := storable(value)) is not None:
        packed = isinstance(value, Tensor) and (
            value.is_quantized or is_traceable_wrapper_subclass(value)
        )
        raise LoadError(
            f"'{name}' is {reason}, which safetensors cannot hold.",
            where=where,
            fix="save the model before quantising it, and quantise what is loaded."
            if packed
            else "make it a dense tensor of numbers, or an extra state of plain values.",
        )


def _literal(value: object) -> str | None:
    """Write a state that is no tensor, if it is made of numbers and strings."""
    text = repr(value)
    try:
        return text if repr(read(text)) == text else None
    except ValueError:
        return None


def identity(tensor: Tensor) -> object:
    """Tell tensors apart that do not share all their memory in one arrangement."""
    if tensor.numel() == 0:
        return id(tensor)
    marks = (tensor.is_conj(), tensor.is_neg(), isinstance(tensor, nn.Parameter))
    place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    return (*marks, *place)


def _strides(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Note memory formats: a kernel may round differently on another one."""
    return {
        name: tensor.stride()
        for name, tensor in tensors.items()
        # Not `is_contiguous`: it overlooks the strides of axes of size 1, kernels do not.
        if name not in aliases
        and tensor.stride() != torch.empty_like(tensor, **_PLAIN).stride()
        and not _overlaps(tensor)
    }


def _overlaps(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torch_otprune", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
