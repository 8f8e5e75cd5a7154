"""One run of the model on an example: order, positions, and residual additions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_otprune.structure.forward import batch_size, evaluating, run
from torch_otprune.structure.graph import Tail
from torch_otprune.structure.layers import BatchNorm, is_depthwise, is_linear

__all__ = ["ADDITIONS", "PASSIVE", "Probe", "probe"]

ADDITIONS = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
)
PASSIVE = (BatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)


@dataclass
class Probe:
    """What one forward pass showed.

    Args:
        calls: how often each leaf ran.
        order: leaves in order of their first call.
        positions: output positions per sample of each convolution or dense layer, over all calls.
        tails: linear layer to what its output passes next.
        outputs: output shape of each leaf's first call.
    """

    calls: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    tails: dict[str, Tail] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)


def probe(model: nn.Module, example: Any) -> Probe:
    """Run the model once on an example and note what happens where.

    Args:
        model: any module; it is left as it was.
        example: one batch.

    Returns:
        the notes.
    """
    watch = _Watch(model, batch_size(example))
    with evaluating(model), torch.no_grad(), watch:
        run(model, example)
    return watch.notes


class _Watch(TorchFunctionMode):
    """Follow each linear layer's output until something else than a batch-norm uses it."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()
        self.model, self.samples, self.notes = model, samples, Probe()
        self.live: dict[int, tuple[str, tuple[str, ...], Tensor]] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Watch:
        for name, module in self.model.named_modules():
            if not list(module.children()):
                self.handles.append(module.register_forward_hook(_Leave(self, name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.live.clear()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in ADDITIONS and isinstance(out, Tensor):
            for operand in args[:2]:
                self._join(operand)
        return out

    def _join(self, operand: Any) -> None:
        if isinstance(operand, Tensor) and (found := self.live.get(id(operand))):
            self.notes.tails[found[0]] = Tail(found[1], added=True)

    def leave(self, name: str, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        """Note one leaf's call."""
        notes = self.notes
        notes.calls[name] = notes.calls.get(name, 0) + 1
        if notes.calls[name] == 1:
            notes.order.append(name)
        if not isinstance(out, Tensor):
            return
        notes.outputs.setdefault(name, tuple(out.shape))
        if is_linear(module) or is_depthwise(module):
            positions = _positions(module, inputs[0], out) // self.samples
            notes.positions[name] = notes.positions.get(name, 0) + positions
        if is_linear(module):
            self._follow(name, (), out)
        elif inputs and (t := self.live.get(id(inputs[0]))) and self._passes(module, t[0], out):
            self._follow(t[0], (*t[1], name), out)

    def _passes(self, module: nn.Module, linear: str, out: Tensor) -> bool:
        """Tell whether a layer keeps channels apart; on tokens, a batch-norm has another axis."""
        dense = isinstance(self.model.get_submodule(linear), nn.Linear)
        crossed = isinstance(module, BatchNorm) and dense and out.dim() > 2
        return isinstance(module, PASSIVE) and not crossed

    def _follow(self, linear: str, passed: tuple[str, ...], out: Tensor) -> None:
        self.live[id(out)] = (linear, passed, out)
        self.notes.tails[linear] = Tail(passed)


def _positions(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """Count how often every weight is used: per output position, per input one if transposed."""
    if isinstance(module, nn.Linear):
        return out.numel() // out.shape[-1]
    grid = x if module.transposed else out
    return grid.numel() // grid.shape[1]


class _Leave:
    """The hook of one leaf."""

    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        self.watch.leave(self.name, module, inputs, out)
