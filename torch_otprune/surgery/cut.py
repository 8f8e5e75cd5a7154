"""Make a model smaller: carry a plan's slices out, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torch_otprune.errors import PlanError
from torch_otprune.plan.model import Cut, Slice
from torch_otprune.structure.layers import Conv, axes, bare_axis, channels, is_depthwise, widths_of

__all__ = ["check_cuts", "cut_", "merged", "put_"]


def cut_(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Remove from a model what the cuts do not keep.

    Every tensor is replaced, none is written: whoever holds the old ones still has them.

    Args:
        model: the dense model.
        cuts: a plan's decisions for exactly this model.

    Raises:
        PlanError: if a slice does not fit; nothing is written then.
    """
    check_cuts(model, cuts)
    for piece in merged(cuts):
        _slice_(model, piece)


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


_PICTURE = 4  # axes of a tensor that may be laid out channels last


def check_cuts(model: nn.Module, cuts: Iterable[Cut]) -> None:
    """Compare every slice with the module it is for.

    Args:
        model: the dense model.
        cuts: a plan's decisions.

    Raises:
        PlanError: naming the first module that is missing or has another width.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for piece in (piece for cut in cuts for piece in cut.slices):
        if piece.path in modules:
            size = channels(modules[piece.path], piece.side)
        else:
            size = _bare_size(parameters.get(piece.path))
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


def _bare_size(parameter: Tensor | None) -> int | None:
    if parameter is None or parameter.numel() < 2:
        return None
    return parameter.shape[bare_axis(parameter.shape)]


def _slice_(model: nn.Module, piece: Slice) -> None:
    owner, _, name = piece.path.rpartition(".")
    keep = torch.tensor(piece.keep, device="cpu")
    try:
        module = model.get_submodule(piece.path)
    except AttributeError:
        parent = model.get_submodule(owner)
        bare = getattr(parent, name)
        put_(parent, name, _take(bare, bare_axis(bare.shape), keep))
        return
    _slice_module_(module, piece, keep)


def _slice_module_(module: nn.Module, piece: Slice, keep: Tensor) -> None:
    inner = keep
    if (
        isinstance(module, Conv)
        and module.groups > 1
        and not is_depthwise(module)
        and piece.side == "in"
    ):
        inner = torch.unique(keep % (module.in_channels // module.groups))
    for tensor, axis in axes(module, piece.side):
        put_(module, tensor, _take(getattr(module, tensor), axis, inner))
    if isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(keep) // module.num_channels
    for attribute in widths_of(module, piece.side):
        setattr(module, attribute, len(keep))


def _take(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    return tensor.detach().index_select(axis, keep.to(tensor.device)).contiguous()


def put_(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by a new tensor, in its own dtype and gradient flag.

    Args:
        module: who owns it.
        name: its name there.
        value: the new value; cast to the old dtype.
    """
    old = getattr(module, name)
    value = value.detach().to(dtype=old.dtype, device=old.device)
    if old.dim() == value.dim() == _PICTURE and not old.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(module, name, value)
