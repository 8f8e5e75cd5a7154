"""Which layers write to a rectifier alone, so that what they write below zero does not count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_otprune.repair.lockstep import Site
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.structure.forward import evaluating, flat_tensors, head, run
from torch_otprune.structure.graph import Tail
from torch_otprune.structure.probe import summands

__all__ = ["rectified"]

_RECTIFIERS = frozenset({torch.relu, torch.relu_, F.relu, F.relu_, Tensor.relu, Tensor.relu_})
_SAMPLES = 2


def rectified(
    dense: nn.Module, small: nn.Module, sites: Sequence[Site], batch: Any
) -> frozenset[str]:
    """Find the sites whose output, behind its tail and its addition, only rectifiers read.

    Args:
        dense: the reference.
        small: the model being mended.
        sites: layers to look at.
        batch: any calibration batch; a few of its samples are run.

    Returns:
        paths of the sites for which this holds in both models, on every rank.
    """
    aimed = {site.path: site.aim or (site.path, site.tail) for site in sites}
    own = {site.path: (site.path, site.tail) for site in sites}
    few = head(batch, _SAMPLES)
    return _everywhere(own, _rectified(dense, aimed, few) & _rectified(small, own, few))


def _everywhere(paths: Iterable[str], found: frozenset[str]) -> frozenset[str]:
    """Keep what all ranks found: one that fits alone would wait for the others' sums."""
    order = list(paths)
    missed = torch.tensor([float(p not in found) for p in order], device="cpu")
    all_sum_([missed])
    return frozenset(p for p, times in zip(order, missed.tolist(), strict=True) if not times)


def _rectified(
    model: nn.Module, ends: Mapping[str, tuple[str, Tail]], batch: Any
) -> frozenset[str]:
    watch = _Watch()
    with ExitStack() as stack:
        for name, (path, tail) in ends.items():
            module = model.get_submodule((path, *tail.modules)[-1])
            follow = _Follow(watch, name, tail.added)
            stack.callback(module.register_forward_hook(follow).remove)
        with evaluating(model), torch.no_grad(), watch:
            out = run(model, batch)
    watch.read(flat_tensors(out))  # what the caller gets, the caller uses
    return frozenset(watch.met - watch.spoilt)


@dataclass(eq=False)
class _Followed:
    """A tensor on its way to a rectifier.

    Args:
        site: whose output it is.
        adds: whether it waits for its addition.
        tensor: kept, so that its id stays its own.
    """

    site: str
    adds: bool
    tensor: Tensor


@dataclass
class _Follow:
    """The hook where a site's tail ends."""

    watch: _Watch
    site: str
    adds: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor):
            self.watch.trails.append(_Followed(self.site, self.adds, out))


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Watch what reads the tensors that are followed."""

    trails: list[_Followed] = field(default_factory=list)
    met: set[str] = field(default_factory=set)
    spoilt: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Take note of a reader that is no rectifier."""
        self.spoilt |= {trail.site for trail in self._among(tensors)}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        touched = self._among(flat_tensors((args, kwargs or {})))
        if touched and flat_tensors(result):  # a shape or a flag says nothing about the values
            self._pass(touched, function, result, summands(function, args, kwargs) is not None)
        return result

    def _among(self, tensors: Sequence[Tensor]) -> list[_Followed]:
        return [trail for trail in self.trails if any(trail.tensor is t for t in tensors)]

    def _pass(self, touched: Sequence[_Followed], function: Any, result: Any, added: bool) -> None:
        for trail in touched:
            if trail.adds and added:
                trail.adds, trail.tensor = False, result
            elif function in _RECTIFIERS and not trail.adds:
                self.met.add(trail.site)
                if result is trail.tensor:  # in place: from here on it is rectified
                    self.trails.remove(trail)
            else:
                self.spoilt.add(trail.site)
