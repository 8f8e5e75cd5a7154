"""Which parameter of a pruned model is which of the dense one, and what it kept of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_otprune.surgery.cut import Shorter
from torch_otprune.surgery.recurrent import refresh_

__all__ = ["Heir", "Lineage", "give_"]

Keeps = Mapping[int, Tensor]  # axis to sorted positions that stay


@dataclass(frozen=True)
class Heir:
    """A parameter of the dense model that lives on in the pruned one, as the same object.

    Args:
        name: what it was called.
        parameter: the object.
        shape: what it had.
        keeps: what it kept along each axis that was cut; None where its values were computed
            anew, as by a fold.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    keeps: Keeps | None


@dataclass
class _Place:
    """Where the pruned model holds a parameter, and which of the dense model's that shall be."""

    owner: nn.Module
    key: str
    old: nn.Parameter
    keeps: Keeps | None = None


@dataclass
class Lineage:
    """Follow the parameters of a model through a pruning, and keep them the same objects.

    An optimiser, a hook or a tag that the user put on a parameter stays on it: the smaller values
    move into the object that was there. Made before the first cut; then `follow`, `pair` and
    `settle_`, in this order.

    Args:
        model: the dense model.

    Attributes:
        before: the dense model's parameters by name.
        heirs: those that live on; known once settled.
        new: the parameters that it did not have, by the names they have before a list of layers
            is compacted.
    """

    model: nn.Module
    before: dict[str, nn.Parameter] = field(init=False)
    heirs: list[Heir] = field(init=False, default_factory=list)
    _shapes: dict[int, torch.Size] = field(init=False)
    _homes: dict[tuple[int, str], nn.Parameter] = field(init=False)
    _modules: list[nn.Module] = field(init=False)
    _kept: dict[int, Keeps] = field(init=False, default_factory=dict)
    _places: list[_Place] = field(init=False, default_factory=list)
    new: dict[str, nn.Parameter] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.before = dict(self.model.named_parameters())
        self._shapes = {id(p): p.shape for p in self.before.values()}
        self._modules = list(self.model.modules())  # held, so that no identity is taken again
        self._homes = {(id(owner), key): p for owner, key, _, p in _held(self.model)}

    def follow(self, shortened: Iterable[Shorter]) -> None:
        """Take note of what a cut did.

        Args:
            shortened: what `cut_` returned.
        """
        found: dict[int, tuple[int, dict[int, Tensor]]] = {}
        for one in shortened:
            root, keeps = found.get(id(one.old), (id(one.old), {}))
            first = keeps[one.axis][one.keep] if one.axis in keeps else one.keep
            found[id(one.new)] = root, {**keeps, one.axis: first}
            self._kept[root] = {**keeps, one.axis: first}

    def pair(self) -> None:
        """Find out whose place every parameter has taken, while paths are still the old ones."""
        self._places, self.new, taken = [], {}, set[int]()
        rest: list[tuple[nn.Module, str, str, nn.Parameter]] = []
        for owner, key, path, now in _held(self.model):
            old = self._homes.get((id(owner), key))
            if old is None:
                rest.append((owner, key, path, now))
                continue
            taken.add(id(old))
            keeps = self._kept.get(id(old), {})
            fits = now is old or _left(self._shapes[id(old)], keeps) == now.shape
            self._places.append(_Place(owner, key, old, keeps if fits else None))
        for owner, key, path, now in rest:  # the module was exchanged, as by a fold
            old = self.before.get(path)
            if old is not None and id(old) not in taken:
                self._places.append(_Place(owner, key, old))
            else:
                self.new[path] = now

    def settle_(self) -> None:
        """Let the pruned model hold the dense model's parameter objects, with the new values."""
        done: dict[int, Keeps | None] = {}
        for place in self._places:
            now = place.owner._parameters[place.key]
            assert now is not None
            if now is not place.old and id(place.old) not in done:
                give_(place.old, now.detach())
                place.old.requires_grad_(now.requires_grad)
            done[id(place.old)] = place.keeps
            place.owner._parameters[place.key] = place.old
            refresh_(place.owner)
        self.heirs = [
            Heir(name, p, self._shapes[id(p)], done[id(p)])
            for name, p in self.before.items()
            if id(p) in done
        ]

    @property
    def gone(self) -> dict[str, nn.Parameter]:
        """List the parameters that the pruned model has no more, by their old names."""
        alive = {id(heir.parameter) for heir in self.heirs}
        return {name: p for name, p in self.before.items() if id(p) not in alive}


def _held(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Yield owner, key, path and object of every parameter, tied ones at every place."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module, key, f"{name}.{key}" if name else key, parameter


def _left(shape: torch.Size, keeps: Keeps) -> torch.Size:
    return torch.Size(len(keeps[a]) if a in keeps else n for a, n in enumerate(shape))


def give_(tensor: Tensor, data: Tensor) -> None:
    """Put other data under a tensor, of any shape and type.

    Args:
        tensor: a leaf; its gradient, if any, is dropped.
        data: what it holds from now on, not copied.
    """
    tensor.grad = None
    if tensor.requires_grad:
        # While a graph of the last step is alive, autograd remembers the old shape; a change of
        # type is what makes it forget.
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
