"""Hold a model to what its policy says must be preserved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.certify.study import Study, study
from torch_otprune.errors import PolicyError, VerificationError
from torch_otprune.nn.convex import constrained
from torch_otprune.policy.preserve import Lipschitz, Preserve
from torch_otprune.structure.forward import head

__all__ = ["Keeper", "keeper"]

_HALVINGS = 12  # of the way back to weights that keep the bound
_ROUNDING = 1e-9  # of a bound, for two ways of adding the same numbers


@dataclass(frozen=True)
class Keeper:
    """Proves what must be preserved, and lends a hand where a repair would lose it.

    Args:
        promises: what must be preserved.
        example: one sample; its first input is the one that counts.
    """

    promises: Preserve
    example: Any

    def lost(self, model: nn.Module) -> str:
        """Say what of it a model does not keep.

        Args:
            model: as it is now.

        Returns:
            what and where; empty where all is kept.
        """
        found = study(model, self.example)
        for promise in self.promises:
            if isinstance(promise, Lipschitz):
                if text := _steep(found, promise.lipschitz):
                    return text
            elif not found.holds(promise):
                why = found.reasons(promise)
                at = f" at '{why[0].module}': {why[0].text}" if why else ""
                return f"it is not proved to be {promise}{at}"
        return ""

    def check(self, model: nn.Module, stage: str) -> None:
        """Refuse a model that lost something.

        Args:
            model: as it is now.
            stage: what was just done to it.

        Raises:
            VerificationError: naming the module that lost it.
        """
        if text := self.lost(model):
            raise VerificationError(
                f"after {stage} the model does not keep what it must: {text}.",
                where="Policy.preserve",
                fix="`ignore` that module, or leave the property out of `preserve`.",
            )

    def signs(self, model: nn.Module) -> dict[str, Tensor]:
        """List the entries of weights that must not become negative.

        Args:
            model: one that keeps what it must.

        Returns:
            full name to a mask of the tensor's shape.
        """
        trail = study(model, self.example).trail
        kinds = [p for p in self.promises if isinstance(p, str)]
        # layers of ours are clamped whole by `project_`, whatever they read
        ours = constrained(model) if kinds else ()
        found = {name: torch.ones_like(t, dtype=torch.bool) for name, t in ours}
        for kind in kinds:
            for name, mask in trail.signs[kind].items():
                found[name] = found[name] | mask if name in found else mask
        return found

    @torch.no_grad()
    def project_(self, model: nn.Module, signs: Mapping[str, Tensor]) -> None:
        """Clamp at zero what must not be negative.

        Args:
            model: written in place.
            signs: as `signs` gave it.
        """
        leaves = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, mask in signs.items():
            leaf = leaves.get(name)
            if leaf is not None and leaf.shape == mask.shape:
                leaf.copy_(torch.where(mask, leaf.clamp_min(0), leaf))

    @torch.no_grad()
    def settle_(self, model: nn.Module, before: Mapping[str, Tensor]) -> str:
        """Bring a repaired model back to what it must keep, as little as it takes.

        Signs are projected. A bound that is passed is met by going back, on a straight line,
        towards the weights before the repair; a convex set of weights is not left on the way.

        Args:
            model: repaired; written in place.
            before: its tensors before the repair, which kept everything.

        Returns:
            what was done, empty where nothing was needed; where it cannot be brought back, why, and
            that starts with `lost`.
        """
        text = self.lost(model)
        if not text:
            return ""
        after = {name: t.clone() for name, t in model.state_dict().items()}
        if {n: t.shape for n, t in after.items()} != {n: t.shape for n, t in before.items()}:
            return f"lost: {text}"  # other modules: there is no straight line back
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            _between_(model, before, after, middle)
            low, high = (low, middle) if self.lost(model) else (middle, high)
        _between_(model, before, after, low)
        if low == 0.0:
            return f"lost: {text}"
        return f"{100 * low:.3g} % of the way, or {text}"


def _between_(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float
) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            old, new = before[name].double(), after[name].double()
            tensor.copy_((1 - share) * old + share * new)


def _steep(found: Study, most: float) -> str:
    bound = found.bound
    if bound is None:
        why = found.reasons("lipschitz")
        at = f" at '{why[0].module}': {why[0].text}" if why else ""
        return f"nothing bounds its slopes{at}"
    if bound > most * (1 + _ROUNDING):
        return f"its slopes are only bounded by {bound:.6g}, more than {most:g}"
    return ""


def keeper(model: nn.Module, promises: Preserve, batch: Any) -> Keeper | None:
    """Prove that a model has what its policy says must be preserved.

    Args:
        model: the dense model.
        promises: `Policy.preserve`.
        batch: calibration data.

    Returns:
        what holds later stages to it; None where nothing is promised.

    Raises:
        PolicyError: if it is not proved of the dense model, with the reason.
    """
    if not promises:
        return None
    found = Keeper(promises, head(batch, 1))
    if text := found.lost(model):
        raise PolicyError(
            f"the model does not have what it is to preserve: {text}.",
            where="Policy.preserve",
            fix=_remedy(text),
        )
    return found


def _remedy(text: str) -> str:
    if "negative" in text:
        return "clamp those weights at zero, as `project_()` does, and train with that projection."
    if "bounded by" in text:
        return "allow a larger bound, or train with smaller weights."
    if "multiplied" in text:
        return "use `ICLSTM(gates='exp')`, or leave the property out of `preserve`."
    return "use relu, softplus, leaky_relu or elu there, or leave the property out of `preserve`."
