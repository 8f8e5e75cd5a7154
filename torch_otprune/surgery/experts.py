"""Fewer experts: lists that lose entries, numbers that count them, routers that never choose them.

A removed expert is one whose logit is minus infinity: after a softmax it has no weight, and no
comparison picks it, whether the softmax comes before the choice or behind it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from torch_otprune.plan.model import Cut, Slice
from torch_otprune.structure.layers import bare
from torch_otprune.structure.routing import Route, Routing, common, numbered, router
from torch_otprune.surgery.layout import is_config

__all__ = ["count_all_", "counts", "entries", "is_mixture", "routed", "settle_", "shorten_"]

_COUNT = re.compile(r"expert|^(n|num|count|size|out_features|num_out|routes)$")
_GROUPS = re.compile(r"^n(um)?_?(expert_?)?groups?$")
_OTHER = re.compile(r"per_tok|top|shared|hidden|inter|dim|active|group|used|width|size_|capacity")


def is_mixture(cut: Cut) -> bool:
    """Tell whether a cut removes whole experts."""
    return any(piece.side == "expert" for piece in cut.slices)


def entries(module: nn.Module | None, side: str) -> int | None:
    """Count the experts of a list; None for any other module."""
    listed = side == "expert" and numbered(module) is not None
    return len(module) if listed else None  # type: ignore[arg-type]


class _ByPlace:
    """A container whose entries keep their old names and are found by their new places."""

    _modules: dict[str, nn.Module]

    def __getitem__(self, place: Any) -> Any:
        kept = list(self._modules.values())
        if isinstance(place, str):
            place = int(place[len(_prefix(self._modules)) :])
        return nn.ModuleList(kept[place]) if isinstance(place, slice) else kept[place]


def _prefix(table: dict[str, nn.Module]) -> str:
    return next(iter(table)).rstrip("0123456789")


def shorten_(model: nn.Module, piece: Slice) -> None:
    """Take experts out of their list; those that stay keep their names until `settle_`.

    Args:
        model: the dense model, written in place; the old list stays as it was.
        piece: which stay.
    """
    path, _, name = piece.path.rpartition(".")
    old = model.get_submodule(piece.path)
    new, table = copy.copy(old), [*old._modules.items()]
    new._modules = dict(table[i] for i in piece.keep)
    new.__class__ = type(type(old).__name__, (_ByPlace, type(old)), {})
    model.get_submodule(path)._modules[name] = new


def settle_(model: nn.Module) -> None:
    """Number the experts that stay from zero: paths change, so this comes last."""
    for module in list(model.modules()):
        if isinstance(module, _ByPlace):
            kind, prefix = type(module).__mro__[2], _prefix(module._modules)
            kept = enumerate(module._modules.values())
            module._modules = {f"{prefix}{i}": entry for i, entry in kept}
            module.__class__ = kind


def counts(model: nn.Module, cut: Cut) -> Iterator[tuple[nn.Module, str, int]]:
    """Find the integers that count the experts of a cut, in the modules around them.

    Args:
        model: the model, its lists shortened already.
        cut: of whole experts.

    Yields:
        module, attribute and its new value.
    """
    modules = dict(model.named_modules())
    paths = [p.path if p.path in modules else bare(p.path)[0] for p in cut.slices]
    inside = tuple(f"{p.path}." for p in cut.slices if p.path in modules)
    scope = common([path.split(".")[:-1] for path in paths])
    for path, module in modules.items():
        near = not scope or path == scope or path.startswith(f"{scope}.")
        if not near or path.startswith(inside):
            continue
        for key, value in vars(module).items():
            new = _follow(cut, key, value) if type(value) is int else None
            if new is not None:
                yield module, key, new


def count_all_(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Put right what speaks of the experts of all mixtures: the model around them, its settings.

    A loss that balances the experts reads it there. Where mixtures differ it cannot be right for
    all of them, and stays.

    Args:
        model: its mixtures cut; written in place, configurations are exchanged for copies.
        cuts: a plan's decisions.
    """
    mixed = [cut for cut in cuts if is_mixture(cut)]
    pieces = [piece for cut in mixed for piece in cut.slices if piece.side == "expert"]
    if len({(piece.size, len(piece.keep)) for piece in pieces}) != 1:
        return
    around = common([bare(piece.path)[0].split(".") for piece in pieces]).split(".")
    holders = {".".join(around[:depth]) for depth in range(len(around) + 1)}
    told = [
        (path, module, key, new)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is int and (new := _follow(mixed[0], key, value)) is not None
    ]
    if any(path not in holders and "expert" in key for path, _, key, _ in told):
        return  # a mixture that was not cut says so
    for path, module, key, new in told:
        if path in holders:
            setattr(module, key, new)
    _tell_configs_(model, mixed[0])


def _tell_configs_(model: nn.Module, cut: Cut) -> None:
    made: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if not is_config(config):
            continue
        if id(config) not in made:
            now = copy.copy(config)
            fields = [(k, v) for k, v in vars(config).items() if type(v) is int]
            for key, new in ((k, _follow(cut, k, v)) for k, v in fields):
                if new is not None:
                    object.__setattr__(now, key, new)
            made[id(config)] = config, now if vars(now) != vars(config) else config
        vars(module)["config"] = made[id(config)][1]


def _follow(cut: Cut, key: str, value: int) -> int | None:
    piece = next(p for p in cut.slices if p.side == "out")  # the router's
    if value == piece.size and _COUNT.search(key) and not _OTHER.search(key):
        return len(piece.keep)
    groups = cut.units < piece.size and value == cut.units
    return len(cut.keep) if groups and _GROUPS.search(key) else None


def routed(
    model: nn.Module, cuts: Sequence[Cut], *, cut: bool, drawn: bool
) -> AbstractContextManager[Any]:
    """Let the routers of some cuts never choose the experts that go.

    Args:
        model: the dense model, or the cut one.
        cuts: a plan's decisions.
        cut: whether it is the cut one.
        drawn: whether logits are drawn at random, the same for both, instead of computed: then
            experts are tried that the example would not reach.

    Returns:
        a context to run the model in.
    """
    routes = [
        Route(router(model, piece.path), piece.keep, piece.size, cut)
        for one in cuts
        if is_mixture(one)
        for piece in one.slices
        if piece.side == "out"
    ]
    return Routing(routes, drawn=drawn) if routes and (drawn or not cut) else nullcontext()
