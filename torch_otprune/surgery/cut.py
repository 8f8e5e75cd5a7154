"""Make a model smaller: carry a plan's slices out, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_otprune.errors import PlanError
from torch_otprune.plan.model import Cut, Slice
from torch_otprune.structure.layers import (
    Conv,
    axes,
    axis_of,
    bare,
    channels,
    widths_of,
)
from torch_otprune.surgery.attention import fit_attention_
from torch_otprune.surgery.attributes import changes
from torch_otprune.surgery.experts import count_all_, counts, entries, is_mixture, shorten_
from torch_otprune.surgery.parametrised import hold_, is_computed
from torch_otprune.surgery.recurrent import fit_shapes_, refresh_

__all__ = ["Shorter", "check_cuts", "cut_", "merged", "places", "put_", "set_"]


def cut_(model: nn.Module, cuts: Sequence[Cut]) -> tuple[Shorter, ...]:
    """Remove from a model what the cuts do not keep.

    Every tensor is replaced, none is written: whoever holds the old ones still has them.

    Args:
        model: the dense model.
        cuts: a plan's decisions for exactly this model.

    Returns:
        what was shortened, in order: a tensor may be shortened along one axis after another.

    Raises:
        PlanError: if a slice does not fit; nothing is written then.
    """
    check_cuts(model, cuts)
    done: dict[_Piece, Shorter] = {}
    pieces = merged(cuts)
    said = changes(model, [cut for cut in cuts if not is_mixture(cut)], pieces)
    modules = dict(model.named_modules())
    lists = [p for p in pieces if entries(modules.get(p.path), p.side)]
    for piece in pieces:
        if piece not in lists:
            _slice_(model, piece, done)
    for change in said:
        change.apply_()
    for piece in lists:  # last: what is inside was found by its old place
        shorten_(model, piece)
    for cut in filter(is_mixture, cuts):
        for owner, name, count in counts(model, cut):
            setattr(owner, name, count)
    count_all_(model, cuts)
    fit_shapes_(model)
    fit_attention_(model)
    return tuple(done.values())


def merged(cuts: Iterable[Cut]) -> list[Slice]:
    """Join the slices that several groups make on one side of one module.

    Args:
        cuts: a plan's decisions.

    Returns:
        one slice per module and side, keeping what all of them keep.

    Raises:
        PlanError: if nothing would be left of a side.
    """
    found: dict[tuple[str, str], Slice] = {}
    for piece in (piece for cut in cuts for piece in cut.slices):
        key = piece.path, piece.side
        keep = set(piece.keep) & set(found[key].keep) if key in found else set(piece.keep)
        if not keep:
            raise PlanError(
                "the cuts leave no channel.",
                where=f"'{piece.path}', side {piece.side}",
                fix="keep more in one of the groups that this module reads.",
            )
        found[key] = piece.model_copy(update={"keep": tuple(sorted(keep))})
    return list(found.values())


@dataclass(frozen=True)
class Shorter:
    """A tensor, and what was put in its place.

    Args:
        old: as it was.
        axis: along which it was cut.
        keep: sorted positions that stay.
        new: what is left.
    """

    old: Tensor
    axis: int
    keep: Tensor
    new: Tensor


_Piece = tuple[int, int, tuple[int, ...]]
"""A tensor by identity, an axis, and what is kept of it."""

_PICTURE = 4  # axes of a tensor that may be laid out channels last


def check_cuts(model: nn.Module, cuts: Iterable[Cut]) -> None:
    """Compare every slice with the module it is for.

    Args:
        model: the dense model.
        cuts: a plan's decisions.

    Raises:
        PlanError: naming the first module that is missing or has another width.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    leaves: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    leaves |= dict(model.named_buffers(remove_duplicate=False))
    for piece in (piece for cut in cuts for piece in cut.slices):
        if piece.path in modules:
            module = modules[piece.path]
            size = entries(module, piece.side) or channels(module, piece.side)
        else:
            size = _bare_size(piece.path, leaves.get(bare(piece.path)[0]))
        if size != piece.size:
            raise PlanError(
                f"the plan cuts {piece.size} channels, the model has {size or 'no such module'}.",
                where=f"'{piece.path}', side {piece.side}",
                fix="apply the plan to the dense model it was made for.",
            )
        if not all(0 <= channel < piece.size for channel in piece.keep):
            raise PlanError(
                f"the plan keeps channel {max(piece.keep)} of {piece.size}.",
                where=f"'{piece.path}', side {piece.side}",
                fix="make the plan anew: this one was edited.",
            )


def _bare_size(path: str, leaf: Tensor | None) -> int | None:
    if leaf is None or leaf.numel() < 2:
        return None
    axis = axis_of(path, leaf.shape)
    return leaf.shape[axis] if axis < leaf.dim() else None


def _slice_(model: nn.Module, piece: Slice, done: dict[_Piece, Shorter]) -> None:
    for owner, name, axis in places(model, piece):
        old = getattr(owner, name)
        key = id(old), axis, piece.keep
        if key not in done:  # tensors that two modules share stay shared
            keep = torch.tensor(piece.keep, device="cpu")
            keep = torch.unique(keep % old.shape[axis]) if old.shape[axis] < piece.size else keep
            done[key] = Shorter(old, axis, keep, put_(owner, name, _take(old, axis, keep)))
        else:
            set_(owner, name, done[key].new)
    if (module := _named(model, piece.path)) is not None:
        _resize_(module, piece)


def _named(model: nn.Module, path: str) -> nn.Module | None:
    """Find a module by its path; None where it is that of a bare parameter."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def places(model: nn.Module, piece: Slice) -> list[tuple[nn.Module, str, int]]:
    """List the tensors that a slice shortens.

    Args:
        model: the dense model, or one that is being cut.
        piece: one slice of a plan.

    Returns:
        owner, name and axis of each.
    """
    if (module := _named(model, piece.path)) is not None:
        return [(module, name, axis) for name, axis in axes(module, piece.side)]
    path, _, name = bare(piece.path)[0].rpartition(".")
    owner = model.get_submodule(path)
    return [(owner, name, axis_of(piece.path, getattr(owner, name).shape))]


def _resize_(module: nn.Module, piece: Slice) -> None:
    """Put a module's integers right."""
    if isinstance(module, nn.GroupNorm):
        kept = module.num_groups * len(piece.keep) // module.num_channels
        module.num_groups = max(kept, 1)
    if piece.side == "through" and isinstance(module, Conv):  # one channel in, one or several out
        module.in_channels = module.groups = module.groups * len(piece.keep) // piece.size
        module.out_channels = len(piece.keep)
        return
    for attribute in widths_of(module, piece.side):
        many = isinstance(getattr(module, attribute), tuple)
        setattr(module, attribute, (len(piece.keep),) if many else len(piece.keep))


def _take(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    return tensor.detach().index_select(axis, keep.to(tensor.device)).contiguous()


def put_(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """Replace a parameter or buffer by a new tensor, in its own dtype and gradient flag.

    Args:
        module: who owns it.
        name: its name there.
        value: the new value; cast to the old dtype.

    Returns:
        what the module holds now.
    """
    old = getattr(module, name)
    value = value.detach().to(dtype=old.dtype, device=old.device)
    if old.dim() == value.dim() == _PICTURE and not old.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last)
    elif old.is_contiguous():  # another arrangement would be lost in a file, and round otherwise
        value = value.contiguous()
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    set_(module, name, value)
    return value


def set_(module: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    """Let a module hold a tensor where it held another, parameter or not."""
    if is_computed(module, name):
        hold_(module, name, value)
    elif name in module._parameters:
        module._parameters[name] = value  # type: ignore[assignment]
    else:
        module._buffers[name] = value  # type: ignore[assignment]
    refresh_(module)
