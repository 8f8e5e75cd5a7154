"""A penalty at work: hooks on blocks while the user's own loop trains the model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torch_otprune.errors import CalibrationError, LoadError, StructureError, TargetError
from torch_otprune.policy.base import nearest
from torch_otprune.statistics.reduce import all_sum_, ranks
from torch_otprune.structure.forward import first_tensor
from torch_otprune.training.base import Memory, Penalty
from torch_otprune.training.gauge import Gauge

__all__ = ["Pressure"]

_KEEP = 0.5  # of the last measured gradient norms, against the noise of one batch
_JUMP = 10.0  # most that the automatic weight grows in one measurement


class Pressure:
    """Watch blocks of a model and return what their penalty adds to the loss.

        with Pressure(model, ["layer1.1", "layer2.1"], MaxSliced(total=steps)) as pressure:
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels) + pressure.penalty()
                optimizer.zero_grad(); loss.backward(); optimizer.step(); pressure.step()

    The value of a block is computed as soon as the block returns, in float32 whatever the
    autocast, so that later layers may write on its output and no feature map is kept longer than
    the model keeps it; the input is copied, as the block itself may write on it. Only forward
    passes of the whole model in training mode with gradients count, and only the last one.

    With `weight="auto"` every `every`-th step runs one backward pass more, from the penalty to the
    watched blocks' parameters (to all parameters where the blocks have none), and compares it
    with what the user's own backward brings to the same parameters. In between nothing is
    measured.

    Limits: blocks that are checkpointed re-entrantly have no graph to follow and are refused; on
    several ranks every rank watches its own batches, and the measured norms are averaged.

    Args:
        model: the model that is trained.
        blocks: module paths; each takes one tensor and returns one, the first of a tuple.
        penalty: what is asked of each of them.
        seed: of all random draws.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[str], penalty: Penalty, *, seed: int = 0
    ) -> None:
        self.model, self.setting = model, penalty
        self.blocks = _checked(model, blocks)
        self.steps, self.base = 0, 0.0 if penalty.weight == "auto" else float(penalty.weight)
        self._seed, self._norms = seed, (math.nan, math.nan)
        self._memories: dict[str, Memory] = {}
        self._open, self._inputs = False, dict[str, list[Tensor]]()
        self._values: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}
        self._gauge: Gauge | None = None
        self._handles = [model.register_forward_pre_hook(_Begin(self))]
        for path in self.blocks:
            module = model.get_submodule(path)
            enter, leave = _Enter(self, path), _Leave(self, path)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave))
        # Last, since the model itself may be the block.
        self._handles.append(model.register_forward_hook(_End(self)))

    def __enter__(self) -> Pressure:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def weight(self) -> float:
        """Say by what factor the penalty enters the loss at this step."""
        total, ramp = self.setting.total, self.setting.ramp
        if total is None or ramp == 0:
            return self.base
        return self.base * min(1.0, self.steps / (ramp * total))

    @property
    def values(self) -> dict[str, float]:
        """List the unweighted value of every block at the last forward pass that counted."""
        return {name: float(value) for name, value in self._seen.items()}

    def penalty(self) -> Tensor:
        """Return what to add to the loss of the last forward pass.

        Returns:
            a scalar: the mean over all watched blocks, times the weight of this step.

        Raises:
            CalibrationError: if there was no forward pass in training mode since the last step.
        """
        if not self._values:
            raise CalibrationError(
                "there is no penalty: no forward pass in training mode since the last step.",
                where=f"Pressure({type(self.model).__name__}), {len(self.blocks)} blocks",
                fix="call model.train(), run a batch through the model, then ask for the penalty.",
            )
        raw = torch.stack(list(self._values.values())).mean()
        loss = raw * self.weight
        if self._due and self._gauge is None and raw.requires_grad:
            parameters = self._parameters()
            self._gauge = Gauge(raw, loss, weight=self.weight, parameters=parameters)
        return loss

    def step(self) -> None:
        """End the step: move the ramp, the directions and, when it is due, the weight.

        Call it once per optimiser step, before or after the optimiser's own.
        """
        if self._due:
            self._measure()
        for memory in self._memories.values():
            memory.commit()
        self._values.clear()
        self.steps += 1

    def remove(self) -> None:
        """Take every hook off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._drop()
        self._open = False
        self._inputs.clear()
        self._values.clear()

    def state_dict(self) -> dict[str, Any]:
        """Write everything that training needs to go on as if it had not stopped.

        Returns:
            plain values and tensors, which `torch.load(weights_only=True)` reads.
        """
        return {
            "blocks": list(self.blocks),
            "kind": self.setting.kind,
            "steps": self.steps,
            "base": self.base,
            "norms": list(self._norms),
            "seed": self._seed,
            "memories": {name: m.state_dict() for name, m in self._memories.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote.

        Args:
            state: of a penalty of the same kind on the same blocks.

        Raises:
            LoadError: if it is of another one.
        """
        own, given = (self.setting.kind, list(self.blocks)), (state["kind"], state["blocks"])
        if own != given:
            raise LoadError(
                f"this state is of {given[0]!r} on {', '.join(given[1])}.",
                where=f"Pressure: {own[0]!r} on {', '.join(own[1])}",
                fix="build the pressure as it was when the state was saved.",
            )
        self.steps, self.base, self._seed = state["steps"], state["base"], state["seed"]
        self._norms = (state["norms"][0], state["norms"][1])
        self._memories = {name: Memory(0) for name in state["memories"]}
        for name, memory in self._memories.items():
            memory.load_state_dict(state["memories"][name])

    @property
    def _due(self) -> bool:
        return self.setting.weight == "auto" and self.steps % self.setting.every == 0

    def _parameters(self) -> list[nn.Parameter]:
        modules = [self.model.get_submodule(path) for path in self.blocks]
        own = {p: None for m in modules for p in m.parameters() if p.requires_grad}
        return list(own) or [p for p in self.model.parameters() if p.requires_grad]

    def _measure(self) -> None:
        """Set the weight so that the gradients stand in the wanted proportion."""
        squares = self._drop()
        # Half precision overflows now and then, and a step may be skipped: not every time counts.
        good = all(map(math.isfinite, squares))
        shared = torch.tensor([*squares, 1.0] if good else [0.0] * 3, dtype=torch.float64)
        if ranks() > 1:
            all_sum_([shared])
        task, pull, count = shared.tolist()
        if not count or not task or not pull:
            return
        new = math.sqrt(task / count), math.sqrt(pull / count)
        if math.isnan(self._norms[0]):
            self._norms = new
        self._norms = tuple(  # type: ignore[assignment]  # two stay two
            _KEEP * old + (1 - _KEEP) * now for old, now in zip(self._norms, new, strict=True)
        )
        wanted = self.setting.fraction * self._norms[0] / self._norms[1]
        self.base = min(wanted, _JUMP * self.base) if self.base else wanted

    def _drop(self) -> tuple[float, float]:
        """End the measurement under way, if there is one, and tell what it saw."""
        squares = (math.nan, math.nan) if self._gauge is None else self._gauge.read()
        self._gauge = None
        return squares

    def begin(self) -> None:
        """Start afresh with a forward pass of the whole model."""
        self._open = self.model.training and torch.is_grad_enabled()
        if self._open:
            self._inputs.clear()
            self._values.clear()
            self._seen.clear()
            if self._gauge is not None and not self._gauge.complete:
                self._drop()  # its batch was never run back

    def end(self) -> None:
        """Close the pass: what recomputes a block during backward is none."""
        self._open = False

    def enter(self, path: str, x: Tensor | None) -> None:
        """Copy what goes into a block.

        Args:
            path: the block.
            x: its first tensor.

        Raises:
            StructureError: if it has none.
        """
        if not self._open:
            return
        if x is None:
            raise self._unfit(path, "it is given no tensor", "target blocks of one tensor.")
        self._inputs.setdefault(path, []).append(x.clone())

    def leave(self, path: str, y: Tensor | None) -> None:
        """Compute the penalty of a block that has just run.

        Args:
            path: the block.
            y: the first tensor that it returns.

        Raises:
            StructureError: if the block does not keep the shape, or runs without gradients.
        """
        if not self._open:
            return
        x = self._inputs[path].pop()
        if not torch.is_grad_enabled():
            fix = "checkpoint it with use_reentrant=False, or do not target it."
            raise self._unfit(path, "it runs without gradients inside a pass that has them", fix)
        if y is None or x.shape != y.shape or not x.dim() or not x.is_floating_point():
            shape = "no tensor" if y is None else str(tuple(y.shape))
            what = f"it maps {tuple(x.shape)} to {shape}"
            raise self._unfit(path, what, "target only blocks that keep the shape of their input.")
        name = path
        while name in self._values:  # a block that is run several times has several values
            name += "+"
        # What is saved here is no part of a checkpoint that the block may be in.
        apart = saved_tensors_hooks(_same, _same)
        with apart, torch.autocast(y.device.type, enabled=False):
            self._values[name] = self.setting.value(x, y, self._memory(name))
        self._seen[name] = self._values[name].detach()

    def _memory(self, name: str) -> Memory:
        if name not in self._memories:
            self._memories[name] = Memory(self._seed ^ zlib.crc32(name.encode()))
        return self._memories[name]

    def _unfit(self, path: str, what: str, fix: str) -> StructureError:
        where = f"Pressure({type(self.model).__name__}), '{path}'"
        return StructureError(f"block '{path}' cannot be watched: {what}.", where=where, fix=fix)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _checked(model: nn.Module, blocks: Iterable[str]) -> tuple[str, ...]:
    """Refuse a list of blocks that is empty or names what is not there."""
    found, known = tuple(dict.fromkeys(blocks)), dict(model.named_modules())
    if not found:
        raise TargetError(
            "there is no block to watch.",
            where=f"Pressure({type(model).__name__})",
            fix="name at least one block.",
        )
    for path in found:
        if path not in known:
            raise TargetError(
                f"{path!r} is no module of this model.",
                where=f"Pressure.blocks; {nearest(path, list(known)[1:], 'modules')}",
                fix="use a full module path.",
            )
    return found


class _Hook:
    """What all hooks share: a copy of the model is not watched."""

    def __init__(self, pressure: Pressure | None, path: str = "") -> None:
        self.pressure, self.path = pressure, path

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the pressure."""
        return type(self), (None, self.path)


class _Begin(_Hook):
    """The hook in front of the model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.pressure is not None:
            self.pressure.begin()


class _End(_Hook):
    """The hook behind the model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.pressure is not None:
            self.pressure.end()


class _Enter(_Hook):
    """The hook in front of a block."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.pressure is not None:
            self.pressure.enter(self.path, first_tensor(args, kwargs))


class _Leave(_Hook):
    """The hook behind a block."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.pressure is not None:
            self.pressure.leave(self.path, first_tensor((out,), {}))
