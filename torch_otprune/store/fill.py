"""Tensors from a file into the places of a model, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torch_otprune.errors import LoadError
from torch_otprune.store.files import Stored
from torch_otprune.store.parts import read
from torch_otprune.store.state import transient
from torch_otprune.surgery.parametrised import Fixed
from torch_otprune.surgery.recurrent import refresh_

__all__ = ["Places", "arranged", "chains_of", "fill_", "finish_", "fit_chains_"]

_CPU = torch.device("cpu")


@dataclass
class Places:
    """Where the tensors of a model belong; making it leaves nothing there but shapes.

    Args:
        model: emptied in place: every place gets a tensor of its own on the meta device.
        device: where all tensors go; None for where each was, and the CPU for what was on meta.
        home: where what was on meta was before.
    """

    model: nn.Module
    device: torch.device | None = None
    home: torch.device = _CPU
    named: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    homes: dict[tuple[int, str], torch.device] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found: dict[int, tuple[nn.Module, str]] = {}
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for leaf, old in table.items():
                    if old is None:
                        continue
                    device = self.home if old.is_meta else old.device
                    self.homes[id(module), leaf] = self.device or device
                    new = torch.empty_like(old, device="meta")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    table[leaf] = new  # type: ignore[assignment]
                    found[id(new)] = module, leaf
        state = self.model.state_dict(keep_vars=True)
        for name, value in {**state, **transient(self.model, state)}.items():
            if id(value) in found:
                self.named[name] = found[id(value)]

    def put_(self, name: str, value: Tensor) -> None:
        """Put a tensor at one of its places."""
        owner, leaf = self.named[name]
        table = owner._parameters if leaf in owner._parameters else owner._buffers
        table[leaf] = value  # type: ignore[assignment]

    def made(self, name: str, value: Tensor) -> Tensor:
        """Move a tensor to where its place is; a parameter becomes one."""
        owner, leaf = self.named[name]
        value = value.to(self.homes[id(owner), leaf])
        old = owner._parameters.get(leaf)
        return value if old is None else nn.Parameter(value, requires_grad=old.requires_grad)


def fill_(
    model: nn.Module, places: Places, stored: Stored, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Put every stored tensor where it belongs, tied ones as one object under all their names.

    Args:
        model: emptied by `places`.
        places: of the model.
        stored: the page.
        tensors: stored name and value.

    Raises:
        LoadError: if a place stays empty.
    """
    names: dict[str, list[str]] = {}
    for name in places.named:
        names.setdefault(stored.aliases.get(name, name), []).append(name)
    rest: dict[str, Tensor] = {}
    for name, stored_value in tensors:
        paired = torch.view_as_complex(stored_value) if name in stored.pairs else stored_value
        value = arranged(paired, stored.strides.get(name))
        own = names.get(name, ())
        if not own:
            rest[name] = value
            continue
        made = places.made(own[0], value)
        for other in own:
            places.put_(other, made)
    if rest:  # a state_dict that is no table of the model's own tensors
        model.load_state_dict(rest, strict=False, assign=True)
    _check_full(model)


def arranged(tensor: Tensor, stride: tuple[int, ...] | None) -> Tensor:
    """Lay a tensor out in memory as it was: a copy to a device keeps dense formats."""
    if stride is None:
        return tensor
    return torch.empty_strided(
        tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def _check_full(model: nn.Module) -> None:
    """Make sure that nothing is left on the meta device, which holds no values."""
    for path, module in model.named_modules():
        tables = {**module._parameters, **module._buffers}
        recomputed = {
            name for name in vars(module) if f"{name}_g" in tables or f"{name}_orig" in tables
        }
        plain = {k: v for k, v in vars(module).items() if k not in recomputed}
        for name, value in {**tables, **plain}.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise LoadError(
                    f"'{f'{path}.{name}'.strip('.')}' has no values: the factory builds it on "
                    "the meta device, and it is not among the saved tensors.",
                    where=f"load, factory of {type(model).__name__}",
                    fix="make it a buffer, or let the factory build on a real device.",
                )


def finish_(model: nn.Module, stored: Stored) -> None:
    """Put back what is no tensor: flags, gradients, states that modules keep for themselves.

    Args:
        model: filled; written in place.
        stored: the page.
    """
    for path, module in model.named_modules():
        module.training = stored.training != (path in stored.exceptions)
        refresh_(module)
        key = f"{path}._extra_state".strip(".")
        if key in stored.extra:
            module.set_extra_state(read(stored.extra[key]))
    if stored.frozen is not None:
        frozen = set(stored.frozen)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(name not in frozen)


def chains_of(model: nn.Module) -> dict[tuple[int, str], nn.Module]:
    """List what computes the weights of parametrised modules, by module and name of the weight."""
    return {
        (id(module), name): chain
        for module in model.modules()
        if is_parametrized(module)
        for name, chain in module.parametrizations.items()  # type: ignore[union-attr, operator]
    }


def fit_chains_(
    model: nn.Module, stored: Stored, dense: Mapping[tuple[int, str], nn.Module]
) -> None:
    """Give computed weights the form that they had when saved.

    Whether a cut weight stays computed depends on its values, which a factory does not know.

    Args:
        model: carried out upon; written in place.
        stored: the page.
        dense: what computed the weights before, from `chains_of`.
    """
    if stored.parts is None:
        return
    for path, module in model.named_modules():
        if not is_parametrized(module):
            continue
        table: nn.ModuleDict = module.parametrizations
        for name, chain in list(table.items()):
            prefix = f"{path}.parametrizations.{name}".strip(".")
            said = stored.parts.of(prefix)[0] if prefix in stored.parts.modules else None
            if said is None or said == type(chain).__name__:
                continue
            learns = any(p.requires_grad for p in chain.parameters())
            bare = said == Fixed.__name__
            form = Fixed(torch.empty(0), learns=learns) if bare else dense[id(module), name]
            table._modules[name] = _resized(form, prefix, stored.tensors)


def _resized(chain: nn.Module, prefix: str, described: Mapping[str, str]) -> nn.Module:
    for path, module in chain.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, old in table.items():
                told = described.get(".".join(filter(None, (prefix, path, leaf))))
                if old is not None and told is not None:
                    new = torch.empty(_shape(told), dtype=old.dtype, device="meta")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    table[leaf] = new
    return chain


def _shape(described: str) -> tuple[int, ...]:
    text = described.partition(":")[0]
    return () if text == "scalar" else tuple(int(size) for size in text.split("x"))
