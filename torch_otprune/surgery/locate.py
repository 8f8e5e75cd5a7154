"""The first op at which a cut model and the masked one part."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, product
from types import FrameType, TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from torch_otprune.plan.model import Cut
from torch_otprune.structure.forward import failing_line, flat_tensors, run

__all__ = ["Compared", "Recorded", "inside", "watched"]

_See: TypeAlias = Callable[[str, str, list[Tensor]], None]
_Key: TypeAlias = tuple[str, str]

_FEW = 64  # ways to read the axes of one tensor
_FAINT = 1e-3  # of the largest number so far: below it rounding may be all there is


class _Within:
    """The hooks that keep a stack of the modules that are running."""

    def __init__(self, stack: list[str], path: str) -> None:
        self.stack, self.path = stack, path

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take notice of a module that begins."""
        self.stack.append(self.path)

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Take notice of its end; what failed inside of it, and was caught, is over as well."""
        while self.path in self.stack and self.stack.pop() != self.path:
            continue


@contextmanager
def inside(model: nn.Module) -> Iterator[list[str]]:
    """Follow which module runs.

    Args:
        model: the model that will run.

    Yields:
        the paths of the modules that are running, the innermost last; after an error, of those
        that were.
    """
    stack, handles = [""], []
    try:
        for path, module in model.named_modules():
            hook = _Within(stack, path)
            handles.append(module.register_forward_pre_hook(hook.enter, prepend=True))
            handles.append(module.register_forward_hook(hook.leave))
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Ops(TorchFunctionMode):
    """Shows every op and what it made to somebody."""

    def __init__(self, stack: Sequence[str], see: _See) -> None:
        super().__init__()
        self.stack, self.see = stack, see

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        made = flat_tensors(args[:1] if out is None else out)  # a write in place returns nothing
        made = [t.detach() for t in made if t.is_floating_point() or t.is_complex()]
        name = _name(function)
        if made and "empty" not in name:
            self.see(self.stack[-1], name, made)
        return out


def _name(function: Any) -> str:
    said = resolve_name(function) or getattr(function, "__name__", "an op")
    return str(said).removesuffix(".__get__").replace("torch.nn.functional.", "F.")


@contextmanager
def watched(model: nn.Module, see: _See, *, skip: Collection[str] = ()) -> Iterator[None]:
    """Show the ops of a run.

    Args:
        model: the model that will run.
        see: told the module's path, the op's name, and the floating tensors that it made.
        skip: modules of which nothing is shown.

    Yields:
        nothing.
    """

    def shown(path: str, name: str, made: list[Tensor]) -> None:
        if not any(path == head or path.startswith(f"{head}.") for head in skip):
            see(path, name, made)

    with inside(model) as stack, _Ops(stack, shown):
        yield


class Recorded:
    """What the ops of the cut model made."""

    def __init__(self) -> None:
        self.made: dict[_Key, list[list[Tensor]]] = {}

    def __call__(self, path: str, name: str, made: list[Tensor]) -> None:
        """Keep a copy: it may be written over."""
        self.made.setdefault((path, name), []).append([t.clone() for t in made])


class Compared:
    """Compares the ops of the masked model with those of the cut one, call by call.

    Where the masked model's tensor is wider, it is read at what some cut keeps. Tensors that no
    cut explains are passed over, and so are ops that the two models do not call equally often.

    Args:
        cut: the cut model's run.
        cuts: a plan's decisions.
        tolerance: difference that rounding may make, as a share of the largest entry.
    """

    def __init__(self, cut: Recorded, cuts: Sequence[Cut], tolerance: float) -> None:
        self.cut, self.tolerance, self.largest = cut.made, tolerance, 0.0
        self.calls: Counter[_Key] = Counter()
        self.parted: dict[_Key, tuple[float, str]] = {}
        pieces = [(p.size, p.keep) for c in cuts for p in c.slices]
        keeps = dict.fromkeys([*pieces, *((c.units, c.keep) for c in cuts)])
        self.keeps = [(size, torch.tensor(keep, device="cpu")) for size, keep in keeps]

    def __call__(self, path: str, name: str, made: list[Tensor]) -> None:
        """Compare one call."""
        key, before = (path, name), self.cut.get((path, name), [])
        number = self.calls[key]
        self.calls[key] += 1
        if key in self.parted or number >= len(before) or len(before[number]) != len(made):
            return
        far = [self._far(*pair) for pair in zip(made, before[number], strict=True)]
        worst = max((value for value in far if value is not None), default=0.0)
        if worst > self.tolerance:
            self.parted[key] = worst, _line(sys._getframe(1))

    def _far(self, wide: Tensor, thin: Tensor) -> float | None:
        """Compare two tensors in the way that suits them best; None where none is known."""
        if wide.dim() != thin.dim() or not thin.numel():
            return None
        ways: list[list[tuple[int, Tensor]]] = []
        for axis, (n, k) in enumerate(zip(wide.shape, thin.shape, strict=True)):
            if n != k:
                fits = [keep for size, keep in self.keeps if (size, len(keep)) == (n, k)]
                ways.append([(axis, keep.to(wide.device)) for keep in fits])
        found = []
        for way in islice(product(*ways), _FEW):
            read = wide
            for axis, keep in way:
                read = read.index_select(axis, keep)
            found.append(self._gap(read, thin))
        return min(found, default=None)

    def _gap(self, expected: Tensor, got: Tensor) -> float:
        alike = (expected == got) | (expected.isnan() & got.isnan())
        size = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
        self.largest = max(self.largest, size)
        apart = (expected - got).abs().nan_to_num(torch.inf).masked_fill(alike, 0.0)
        scale = max(size, _FAINT * self.largest)
        return float(apart.max()) / scale if scale else float(apart.max())

    def first(self) -> str:
        """Say where they part.

        Returns:
            one clause; empty where no op is known to differ.
        """
        for (path, name), (far, line) in self.parted.items():
            if self.calls[path, name] == len(self.cut[path, name]):
                whose = f"'{path}'" if path else "the model's own forward"
                place = f" (at {line})" if line else ""
                return f"first by {far:.1e} at {name} in {whose}{place}"
        return ""


def _line(frame: FrameType | None) -> str:
    """Name the line of the user's code that is running, as that of an error."""
    trace: TracebackType | None = None
    while frame is not None and frame.f_globals.get("__name__") != run.__module__:
        trace = TracebackType(trace, frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return failing_line(Exception().with_traceback(trace))
