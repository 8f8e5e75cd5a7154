"""What an expert contributes: its mixture's output with it, less the output without it."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.blame import finite
from torch_otprune.statistics.moments import Moments
from torch_otprune.statistics.patches import pick
from torch_otprune.statistics.recorder import Recorder
from torch_otprune.structure.graph import Group
from torch_otprune.structure.routing import Route, Routing, around, router
from torch_otprune.structure.wiring import first_of

__all__ = ["watch_experts"]

_TOKENS = 32  # of each sample: every one costs one run of the mixture per expert
_STREAM = 3  # axes of an output with positions of its own


def watch_experts(model: nn.Module, groups: Iterable[Group], recorder: Recorder) -> None:
    """Observe, with a recorder, what the experts of some mixtures contribute.

    A mixture runs once more for each of its experts, with that expert's logit at minus infinity.
    The moments of what this changes, one column per expert, are filed under the group's name.

    Args:
        model: the model to hook.
        groups: mixtures of experts.
        recorder: takes the hooks off with its own.
    """
    for group in groups:
        module = model.get_submodule(around(group))
        hook = _Without(model, group, recorder)
        recorder.others[group.name] = group.units
        recorder.handles.append(module.register_forward_hook(hook, with_kwargs=True))


class _Without:
    """The hook of one mixture."""

    def __init__(self, model: nn.Module, group: Group, recorder: Recorder | None) -> None:
        self.model, self.group, self.recorder = model, group, recorder

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        recorder = self.recorder
        if recorder is None or not recorder.active:
            return
        recorder.active = False
        try:
            written = self._part(first_of(out))
            changes = [
                written - self._part(self._without(expert, module, args, kwargs))
                for expert in range(self.group.units)
            ]
        finally:
            recorder.active = True
        rows = torch.stack([change.flatten() for change in changes], 1)
        if not finite(rows):
            raise CalibrationError(
                "a mixture's output is not finite where its router never chooses some expert.",
                where=f"group '{self.group.name}'",
                fix="choose criterion 'magnitude' or 'random', which need no data.",
            )
        name, moments = self.group.name, recorder.moments
        if name not in moments:
            moments[name] = Moments.empty(self.group.units, rows.device)
        # a mean over tokens of what is a sum over channels
        moments[name].update(rows * sqrt(written.shape[-1]))

    def _without(
        self, expert: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        group = self.group
        routes = [
            Route(
                router(self.model, member.path),
                tuple(sorted(set(range(member.size)) - set(member.index[expert].tolist()))),
                member.size,
                cut=False,
            )
            for member in group.producers
        ]
        with Routing(routes, drawn=False):
            found = first_of(module.forward(*args, **kwargs))
        assert found is not None, "a mixture returns a tensor"
        return found

    def _part(self, out: Tensor | None) -> Tensor:
        """Take the samples that count, and some positions of each."""
        assert self.recorder is not None and out is not None
        part = self.recorder._part(out.detach()).double()
        if part.dim() < _STREAM:
            return part
        at = pick(part.shape[1], _TOKENS, self.group.name, self.recorder.seed)
        return part[:, at.to(part.device)]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the statistics: a copy of the model is not observed."""
        return _Without, (None, self.group, None)
