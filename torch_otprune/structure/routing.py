"""Runs in which routers never choose certain experts, whatever computes their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from torch_otprune.structure.graph import Group
from torch_otprune.structure.layers import bare

__all__ = ["Route", "Routing", "Visits", "around", "common", "numbered", "router"]

_Run = TypeVar("_Run")


@dataclass(frozen=True)
class Route:
    """One router.

    Args:
        weight: of its matrix, in the model that runs.
        keep: the experts that stay.
        size: how many there were.
        cut: whether the model that runs has only those.
        chosen: how many it chooses for one token.
    """

    weight: Tensor
    keep: tuple[int, ...]
    size: int
    cut: bool = False
    chosen: int = 1


def router(model: nn.Module, path: str) -> Tensor:
    """Find the weight of a router, a layer's or a bare parameter.

    Args:
        model: the model that runs.
        path: as a group's member has it.

    Returns:
        the weight.
    """
    try:
        found = model.get_submodule(path).weight
    except AttributeError:
        owner, _, name = bare(path)[0].rpartition(".")
        found = getattr(model.get_submodule(owner), name)
    assert isinstance(found, Tensor), f"'{path}' is no router"
    return found


_BOTH = ("mm", "addmm", "bmm", "baddbmm", "matmul", "_addmm_activation")
_LAST = ("linear", "mkldnn_linear")
_CHOICES = ("topk", "argmax", "max", "sort")
_SHAPES = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze")
_TURNS = ("transpose", "permute", "t")
_NEVER = float("-inf")


class Routing(TorchDispatchMode):
    """Rewrite the logits where a router's weight, or a view or copy of it, is multiplied.

    Those of experts that go are minus infinity, so that no softmax gives them weight; and so is
    whatever of the logits' shape was computed from them, where it is compared: scores with a
    bias of their own behind a sigmoid would be finite again.

    Args:
        routes: the routers.
        drawn: whether all logits are drawn at random instead, the same in every such run.
    """

    def __init__(self, routes: Sequence[Route], *, drawn: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn, self.calls = drawn, 0
        # tensors are kept so that their ids stay their own
        self.known = {id(route.weight): (route.weight, route) for route in routes}
        self.gone: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        given = [a for a in args if isinstance(a, Tensor)]
        scores = next((t for t in given if id(t) in self.gone), None)
        if scores is not None:
            return self._behind(function, args, kwargs, scores)
        out = function(*args, **kwargs)
        at = next((i for i, tensor in enumerate(given) if id(tensor) in self.known), None)
        if at is None or not isinstance(out, Tensor):
            return out
        route = self.known[id(given[at])][1]
        axis = _axis(name, at, given, out)
        width = len(route.keep) if route.cut else route.size
        if axis is not None and out.shape[axis] == width:
            return self._logits(out, axis, route)
        if len(given) == 1 and out.numel() == route.weight.numel():
            self.known[id(out)] = out, route
        return out

    def _logits(self, out: Tensor, axis: int, route: Route) -> Tensor:
        if self.drawn:
            out = self._draw(out, axis, route)
        if route.cut:
            return out
        gone = sorted(set(range(route.size)) - set(route.keep))
        index = torch.tensor(gone, dtype=torch.int64, device=out.device)
        mask = torch.zeros_like(out, dtype=torch.bool).index_fill(axis, index, value=True)
        return self._note(out.masked_fill(mask, _NEVER), mask)

    def _draw(self, out: Tensor, axis: int, route: Route) -> Tensor:
        self.calls += 1
        generator = torch.Generator("cpu").manual_seed(self.calls)
        shape = [*out.shape]
        shape[axis] = route.size
        made = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        if route.cut:
            made = made.index_select(axis, torch.tensor(route.keep, device="cpu"))
        return made.to(out)

    def _note(self, out: Tensor, mask: Tensor) -> Tensor:
        self.gone[id(out)] = out, mask
        return out

    def _behind(self, function: Any, args: Any, kwargs: Any, scores: Tensor) -> Any:
        """Follow what is computed from logits, up to where it is compared."""
        name, mask = function.overloadpacket.__name__, self.gone[id(scores)][1]
        if name in _CHOICES and args[0] is scores:
            return self._chosen(function, args, kwargs, scores, mask)
        out = function(*args, **kwargs)
        if not (isinstance(out, Tensor) and out.is_floating_point()):
            return out
        if out.shape == mask.shape:
            return self._note(out, mask)
        if name in _SHAPES and out.numel() == mask.numel():
            return self._note(out, mask.reshape(out.shape))
        if name in _TURNS:
            return self._note(out, function(mask, *args[1:], **kwargs))
        if name == "sum" and len(args) > 1:
            return self._note(out, _all(mask, args[1], out.shape))
        return out

    def _chosen(self, function: Any, args: Any, kwargs: Any, scores: Tensor, mask: Tensor) -> Any:
        axis = next((a for a in args[2 if "topk" in str(function) else 1 :]), -1)
        axis = kwargs.get("dim", axis)
        axis = axis if type(axis) is int else -1
        whole = mask.all(axis, keepdim=True)  # a group of experts, or an expert that chooses
        filled = scores.masked_fill(mask & ~whole, _NEVER)
        out = function(filled, *args[1:], **kwargs)
        if isinstance(out, tuple) and out[0].dim() == mask.dim():
            self._note(out[0], whole.expand(out[0].shape))
        return out


def _all(mask: Tensor, axes: Sequence[int], shape: Sequence[int]) -> Tensor:
    for axis in axes:
        mask = mask.all(axis, keepdim=True)
    return mask.reshape(shape)


class Visits(Routing):
    """Runs in which tokens are sent to one expert after the other, until all have been reached.

    Logits are overwritten, so that whoever follows the run still sees the router's own.

    Args:
        routes: the routers of a dense model.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        super().__init__(routes, drawn=False)
        self.left = {id(route.weight): route.size for route in routes}

    @property
    def done(self) -> bool:
        """Tell whether every expert had a token."""
        return all(left <= 0 for left in self.left.values())

    def runs(self, run: Callable[[], _Run]) -> list[_Run]:
        """Run as often as it takes to reach every expert.

        Args:
            run: of the model on an example.

        Returns:
            what the runs returned; none for routers that the model does not run.
        """
        found: list[_Run] = []
        before: dict[int, int] = {}
        while not self.done and self.left != before:
            before = dict(self.left)
            with self:
                found.append(run())
        return found

    def _logits(self, out: Tensor, axis: int, route: Route) -> Tensor:
        tokens, first = out.numel() // route.size, route.size - self.left[id(route.weight)]
        with _disable_current_modes():
            starts = first + route.chosen * torch.arange(tokens, device=out.device)
            places = torch.arange(route.size, device=out.device)
            ahead = (places - starts[:, None]) % route.size
            wide = out.movedim(axis, -1)
            wide.copy_(-ahead.view(wide.shape))
        self.left[id(route.weight)] -= tokens * route.chosen
        return out


def _axis(name: str, at: int, given: Sequence[Tensor], out: Tensor) -> int | None:
    """Tell along which axis a product has one number per row of its operand."""
    if name in _LAST:
        return out.dim() - 1 if at == 1 else None
    if name in ("mv", "addmv"):
        return out.dim() - 1
    if name == "convolution":
        return 1
    if name not in _BOTH:
        return None
    return out.dim() - 1 if at == len(given) - 1 else out.dim() - 2


def common(paths: Sequence[Sequence[str]]) -> str:
    """Name the innermost module around several.

    Args:
        paths: each split at its dots.

    Returns:
        its path.

    Example:
        >>> common([["a", "b", "gate"], ["a", "b", "experts", "up"]])
        'a.b'
    """
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def numbered(module: nn.Module | None) -> str | None:
    """Tell how a container of modules numbers its entries from zero.

    Args:
        module: any module, or none.

    Returns:
        what stands before the number; None where it is no list, or entries have other names.

    Example:
        >>> numbered(nn.ModuleDict({"expert_0": nn.ReLU(), "expert_1": nn.ReLU()}))
        'expert_'
    """
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not len(module):
        return None
    names = [*module._modules]
    prefix = names[0].removesuffix("0")
    return prefix if names == [f"{prefix}{i}" for i in range(len(names))] else None


def around(group: Group) -> str:
    """Name the module around a mixture: its router and its experts.

    Args:
        group: of experts.

    Returns:
        its path; empty for the model itself.
    """
    return common([bare(m.path)[0].split(".")[:-1] for m in group.members])
