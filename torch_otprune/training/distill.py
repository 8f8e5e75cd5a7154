"""Learn from the network before it was pruned: its answers on the same inputs, no labels."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from numbers import Real
from typing import Any, Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, PolicyError
from torch_otprune.structure import Call, flat_tensors
from torch_otprune.structure.forward import evaluating

__all__ = ["Distill", "Match", "check_terms"]

Match = Literal["auto", "logits", "values"]


class Distill:
    """Compare what a model says while it trains with what a teacher says to the same input.

        teacher = copy.deepcopy(model)
        report = otp.prune_(model, policy, loader)
        with Distill(model, teacher) as distill:
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels) + distill()

    Logits are compared by the Kullback-Leibler divergence of the softened answers, other outputs
    by their squared distance relative to the teacher's squared size. Positions that an
    `attention_mask` calls padding do not count. Only forward passes of the whole model in training
    mode with gradients count, and only the last one. The teacher runs in evaluation mode, just
    before the model does, under the same autocast.

    Limits: holds the teacher in memory, as large as the dense model, and costs one forward pass
    of it per step. A compiled model is not seen: call the module itself.

    Source: Hinton et al. 2015, eq. 4, times the squared temperature as they advise.

    Args:
        model: that is trained.
        teacher: takes the same inputs; its gradients are off from here on.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        self.model, self.teacher = model, teacher.requires_grad_(False)
        self.active = True
        self._call: Call | None = None
        self._wanted: Any = None
        self._got: Any = None
        self._handles = [
            model.register_forward_pre_hook(_Before(self), with_kwargs=True),
            model.register_forward_hook(_Behind(self)),
        ]

    def __enter__(self) -> Distill:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._call = self._wanted = self._got = None

    def __call__(
        self, weight: float = 1.0, *, temperature: float = 2.0, match: Match = "auto"
    ) -> Tensor:
        """Say what to add to the loss of the last forward pass.

        Args:
            weight: factor of the term, at least 0.
            temperature: above 0; divides logits before the softmax.
            match: `logits`, `values`, or `auto`: logits are a mapping's `logits`, or the only
                tensor if it is samples x classes.

        Returns:
            a scalar that gradients flow through.

        Raises:
            CalibrationError: if there was no forward pass in training mode since the last round.
            PolicyError: if an argument makes no sense.
        """
        check_terms(weight, temperature, match)
        if self._got is None or self._call is None:
            raise CalibrationError(
                "there is nothing to compare: no forward pass in training mode was seen.",
                where=f"distill, {type(self.model).__name__}",
                fix="call model.train(), run a batch through the module itself, not a compiled or "
                "copied one, then ask for the distillation.",
            )
        got, wanted = self._got, self._wanted
        first, second = (_logits(tree, match) for tree in (got, wanted))
        if first is None or second is None or first.shape != second.shape:
            return weight * _values(got, wanted)
        mask = self._call.kwargs.get("attention_mask")
        return weight * _divergence(first, second, temperature=temperature, mask=mask)

    def before(self, call: Call) -> None:
        """Ask the teacher, before the model can write on its input.

        Args:
            call: the model's arguments.
        """
        self._got = None
        if not self._counts():
            return
        with torch.no_grad(), evaluating(self.teacher):
            self._wanted = self.teacher(*call.args, **call.kwargs)
        self._call = call

    def behind(self, output: Any) -> None:
        """Keep what the model says.

        Args:
            output: its own, with gradients.
        """
        if self._counts():
            self._got = output

    def _counts(self) -> bool:
        return self.active and self.model.training and torch.is_grad_enabled()


def check_terms(weight: object, temperature: object, match: object) -> None:
    """Refuse what makes no sense of a distillation, also before there is anything to compare.

    Args:
        weight: factor of the term.
        temperature: divides logits.
        match: what is compared.

    Raises:
        PolicyError: if one of them is out of its range.
    """
    where, known = "distill", [repr(name) for name in get_args(Match)]
    if not _number(weight) or weight < 0:
        fix = "give a finite number of at least 0."
        raise PolicyError(f"the weight is {weight!r}.", where=f"{where}, weight", fix=fix)
    if not _number(temperature) or temperature <= 0:
        fix = "give a finite number above 0, such as 2.0."
        raise PolicyError(
            f"the temperature is {temperature!r}.", where=f"{where}, temperature", fix=fix
        )
    if repr(match) not in known:
        raise PolicyError(
            f"{match!r} is nothing that can be matched.",
            where=f"{where}, match",
            fix=f"write {', '.join(known[:-1])} or {known[-1]}.",
        )


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _logits(tree: Any, match: Match) -> Tensor | None:
    if match == "values":
        return None
    if isinstance(tree, Mapping) and isinstance(found := tree.get("logits"), Tensor):
        return found
    tensors = _floating(tree)
    only = len(tensors) == 1 and (match == "logits" or tensors[0].dim() == 2)
    return tensors[0] if only and tensors[0].shape[-1] > 1 else None


def _floating(tree: Any) -> list[Tensor]:
    return [t for t in flat_tensors(tree) if t.is_floating_point() and t.dim()]


def _divergence(got: Tensor, wanted: Tensor, *, temperature: float, mask: Tensor | None) -> Tensor:
    """Average the divergence over all positions that count."""
    axis = 1 if got.dim() > 3 else -1  # pictures have their classes in front
    # autocast would round the difference of two nearly equal logarithms away
    with torch.autocast(got.device.type, enabled=False):
        mine = F.log_softmax(got.float() / temperature, dim=axis)
        theirs = F.log_softmax(wanted.detach().float() / temperature, dim=axis)
        each = (theirs.exp() * (theirs - mine)).sum(axis) * temperature**2
    if mask is None or mask.shape != each.shape:
        return each.mean()
    weight = mask.to(each)
    return (each * weight).sum() / weight.sum().clamp_min(1.0)


def _values(got: Any, wanted: Any) -> Tensor:
    """Average the relative squared distance over all tensors of the output."""
    pairs = zip(_floating(got), _floating(wanted), strict=False)
    parts = [
        (a.float() - b.float()).square().sum() / b.float().square().sum().clamp_min(1e-12)
        for a, b in pairs
        if a.shape == b.shape
    ]
    if not parts:
        raise CalibrationError(
            "the outputs have no floating tensor of one shape in common.",
            where="distill",
            fix="let both models return tensors of equal shapes.",
        )
    return torch.stack(parts).mean()


class _Before:
    """The hook in front of the model."""

    def __init__(self, distill: Distill | None) -> None:
        self.distill = distill

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.distill is not None and not torch.compiler.is_compiling():
            self.distill.before(Call(args, kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the teacher."""
        return type(self), (None,)


class _Behind(_Before):
    """The hook behind it."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.distill is not None and not torch.compiler.is_compiling():
            self.distill.behind(out)
