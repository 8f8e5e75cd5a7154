"""Soft masks at work: what reads a unit reads it scaled, and a block adds only a share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torch_otprune.errors import StructureError
from torch_otprune.plan.model import Slice
from torch_otprune.structure.graph import Block, Group, Member
from torch_otprune.structure.mute import exchanged
from torch_otprune.structure.wiring import first_of, stream_of
from torch_otprune.surgery.cut import places, set_
from torch_otprune.surgery.parametrised import is_computed

__all__ = ["Gates"]


@dataclass(frozen=True)
class _Scaled:
    """A tensor whose entries along one axis are scaled by the masks of some units.

    Args:
        module: its owner.
        name: its name there.
        axis: along which.
        group: whose masks.
        units: the unit of each entry; as many as the group has units for entries of none. None
            where every entry of the tensor has a mask of its own.
    """

    module: nn.Module
    name: str
    axis: int
    group: str
    units: Tensor | None


class Gates:
    """Scale, while the model runs, what reads each unit, and what each block adds.

    A unit is masked where it is read: behind norms and activations, in every layer that reads
    it, as cutting it would. Consumers' weights are scaled while the model runs and are themselves
    otherwise, so that nothing of this is in `state_dict`. A part that is run once more during
    the backward pass, as checkpointing does, is scaled again.

    Args:
        model: that is trained.
        groups: whose units are masked.
        blocks: that are masked whole.
        masks: by name of the group, block or layer; read at every pass, so entries may be
            replaced.
        layers: whose weights are masked one by one.

    Raises:
        StructureError: if a parametrisation computes a weight that would be scaled.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        blocks: Sequence[Block],
        masks: Mapping[str, Tensor],
        *,
        layers: Iterable[str] = (),
    ) -> None:
        self.model, self.blocks, self.masks = model, tuple(blocks), masks
        self.active, self.passes = True, 0
        self._scaled = [scaled for group in groups for scaled in _read(model, group)]
        self._scaled += [
            _Scaled(model.get_submodule(path), "weight", 0, path, None) for path in layers
        ]
        self._below = _below(model, self._scaled)
        self._live: set[int] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def hook(self) -> None:
        """Put the hooks on."""
        if self._handles:
            return
        for path, indices in self._below.items():
            module, gate = self.model.get_submodule(path), _Swap(self, indices)
            self._handles += [
                module.register_forward_pre_hook(gate.enter),
                module.register_forward_hook(gate.leave, always_call=True),
            ]
        for block in self.blocks:
            first = block.swaps[0]
            module, share = self.model.get_submodule(first.path), _Share(self, block)
            self._handles += [
                module.register_forward_pre_hook(share.enter, with_kwargs=True),
                module.register_forward_hook(share.leave, always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the model as it is.

        Yields:
            nothing.
        """
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    @torch.no_grad()
    def bake_(self) -> None:
        """Write the masks into the weights; hard ones may be written again and again."""
        for scaled in self._scaled:
            held = getattr(scaled.module, scaled.name)
            held.mul_(self._factor(scaled, held))

    def enter(self, indices: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Scale what is not scaled yet.

        Args:
            indices: of the tensors.

        Returns:
            those that were scaled, as they were before.
        """
        if not self.active:
            return []
        self.passes += torch.is_grad_enabled()
        swapped = []
        # what is saved here is no part of a checkpoint that runs the module once more
        with saved_tensors_hooks(_same, _same):
            for index in (i for i in indices if i not in self._live):
                scaled = self._scaled[index]
                before = getattr(scaled.module, scaled.name)
                set_(scaled.module, scaled.name, before * self._factor(scaled, before))
                self._live.add(index)
                swapped.append((index, before))
        return swapped

    def leave(self, swapped: Sequence[tuple[int, Tensor]]) -> None:
        """Put back what was there.

        Args:
            swapped: what `enter` returned.
        """
        for index, before in reversed(swapped):
            scaled = self._scaled[index]
            set_(scaled.module, scaled.name, before)
            self._live.discard(index)

    def _factor(self, scaled: _Scaled, like: Tensor) -> Tensor:
        mask = self.masks[scaled.group].to(device=like.device)
        if scaled.units is None:
            return mask.view(like.shape).to(like.dtype)
        factor = torch.cat([mask, mask.new_ones(1)])[scaled.units.to(like.device)]
        shape = [1] * like.dim()
        shape[scaled.axis] = len(factor)
        return factor.view(shape).to(like.dtype)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class _Swap:
    """The hooks around a module that holds scaled tensors, at any depth."""

    gates: Gates | None
    indices: tuple[int, ...]
    open: list[list[tuple[int, Tensor]]] = field(default_factory=list)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # a compiled model keeps masks as they were when it was compiled: better none
        if self.gates is not None and not torch.compiler.is_compiling():
            self.open.append(self.gates.enter(self.indices))

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.gates is not None and self.open:
            self.gates.leave(self.open.pop())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the gates: a copy of the model is not masked."""
        return _Swap, (None, ())


@dataclass
class _Share:
    """The hooks around a block."""

    gates: Gates | None
    block: Block | None
    streams: list[Tensor | None] = field(default_factory=list)

    @property
    def _idle(self) -> bool:
        return self.gates is None or not self.gates.active or torch.compiler.is_compiling()

    @property
    def silent(self) -> bool:
        return self.block is not None and self.block.swaps[0].by == "zero"

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the stream, to which the block may add in place."""
        if self._idle or self.silent:
            return
        assert self.gates is not None
        self.gates.passes += torch.is_grad_enabled()
        stream = stream_of(args, kwargs)
        self.streams.append(None if stream is None else stream.clone())

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if self._idle:
            return None
        assert self.gates is not None
        assert self.block is not None
        stream = self.streams.pop() if self.streams else None
        written = first_of(out)
        if written is None:  # forward has failed
            return None
        mask = self.gates.masks[self.block.name].to(written.device, written.dtype)
        if self.silent:
            return exchanged(out, written, mask * written)
        assert stream is not None
        return exchanged(out, written, torch.lerp(stream, written, mask))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the gates: a copy of the model is not masked."""
        return _Share, (None, None)


def _read(model: nn.Module, group: Group) -> Iterator[_Scaled]:
    """List what reads a group; what writes it, where units meet before anything reads them."""
    for member in group.consumers or group.producers:
        units = torch.full((member.size,), group.units, dtype=torch.long, device="cpu")
        each = torch.arange(group.units, device="cpu")[:, None].expand_as(member.index)
        units[member.index.cpu()] = each
        for owner, name, axis in places(model, _whole(member)):
            if is_computed(owner, name):
                raise StructureError(
                    f"a parametrisation computes the {name} of '{member.path}', which a mask "
                    "would scale.",
                    where=f"criterion 'dtp', group '{group.name}'",
                    fix="remove the parametrisation first, or `ignore` this group.",
                )
            held = getattr(owner, name)
            # a filter of a grouped convolution reads the same place of every group
            own = units[: held.shape[axis]].to(held.device)
            yield _Scaled(owner, name, axis, group.name, own)


def _whole(member: Member) -> Slice:
    every = tuple(range(member.size))
    return Slice(path=member.path, side=member.side, size=member.size, keep=every)


def _below(model: nn.Module, scaled: Sequence[_Scaled]) -> dict[str, tuple[int, ...]]:
    """List, per module, the scaled tensors that it or a part of it owns; outermost first."""
    owners = [{id(part) for part in module.modules()} for module in model.modules()]
    paths = [path for path, _ in model.named_modules()]
    found = {
        path: tuple(i for i, s in enumerate(scaled) if id(s.module) in held)
        for path, held in zip(paths, owners, strict=True)
    }
    return {path: indices for path, indices in found.items() if indices}
