"""Prune inside a loop that Accelerate drives, from the extra `hf`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torch_otprune.attach import attach as attach_
from torch_otprune.errors import OTPruneError
from torch_otprune.integrations.extras import needed
from torch_otprune.integrations.loop import check_alone
from torch_otprune.policy import Policy
from torch_otprune.report import Report
from torch_otprune.surgery.rebind import Optimizes
from torch_otprune.training.distill import Match

__all__ = ["Accelerated", "attach", "bare"]


class Accelerated:
    """A policy attached to a model that Accelerate has prepared. Made by `attach`.

    Args:
        accelerator: that prepared it.
        model: as prepared, or bare.
        policy: the declaration.
        example: as for `otp.attach`.
        data: as for `otp.attach`.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        policy: Policy | None,
        *,
        example: Any = None,
        data: Any = None,
    ) -> None:
        kind = needed("accelerate", "hf").Accelerator
        if not isinstance(accelerator, kind) or not isinstance(model, nn.Module):
            raise _swapped(accelerator, model)
        check_alone(accelerator.num_processes, "accelerate.attach, Accelerator.num_processes")
        self.accelerator = accelerator
        inner = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.attached = attach_(inner, policy, example=example, data=data)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def step(
        self, *optimizers: Optimizes, ema: nn.Module | Iterable[nn.Module] = ()
    ) -> Report | None:
        """Count one optimiser step, if there was one, and prune where a round is due.

        Args:
            *optimizers: as Accelerate prepared them, or bare.
            ema: averaged copies that follow.

        Returns:
            the report of a round; nothing while gradients are accumulated, or where the scaler
            skipped the step.
        """
        skipped = bool(optimizers) and all(map(_skipped, optimizers))
        if skipped or not self.accelerator.sync_gradients:
            return None
        return self.attached.step(*map(bare, optimizers), ema=ema)

    def penalty(self) -> Tensor:
        """Say what the rules' penalties add to the loss, as `Attached.penalty` does."""
        return self.attached.penalty()

    def distill(
        self, weight: float = 1.0, *, temperature: float = 2.0, match: Match = "auto"
    ) -> Tensor:
        """Say what distillation adds to the loss, as `Attached.distill` does."""
        return self.attached.distill(weight, temperature=temperature, match=match)

    def state_dict(self) -> dict[str, Any]:
        """Write how far the schedule is; `accelerator.register_for_checkpointing` asks for it."""
        return self.attached.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote; before model and optimiser are prepared."""
        self.attached.load_state_dict(state)

    def remove(self) -> None:
        """Take the hooks off."""
        self.attached.remove()


def attach(
    accelerator: Any,
    model: nn.Module,
    policy: Policy | None = None,
    *,
    example: Any = None,
    data: Any = None,
) -> Accelerated:
    """Put a policy on a model that Accelerate has prepared.

    Args:
        accelerator: that prepared it.
        model: as prepared, or bare.
        policy: the declaration; None takes the one on the class.
        example: one batch to analyse the model on; needed where a rule has a penalty or
            criterion `dtp`.
        data: what the rounds decide and repair on; None takes what the model trained on last.

    Returns:
        the handle, a context manager.

    Raises:
        OTPruneError: as `otp.attach`, if several processes train together, or if the first two
            arguments are swapped.
    """
    return Accelerated(accelerator, model, policy, example=example, data=data)


def _swapped(accelerator: object, model: object) -> OTPruneError:
    given = f"{type(accelerator).__name__} and {type(model).__name__}"
    return OTPruneError(
        f"attach takes the accelerator first, then the model; it got {given}.",
        where="accelerate.attach",
        fix="write attach(accelerator, model, policy).",
    )


def _skipped(optimizer: Optimizes) -> bool:
    wrapper = needed("accelerate.optimizer", "hf").AcceleratedOptimizer
    return bool(isinstance(optimizer, wrapper) and optimizer.step_was_skipped)


def bare(optimizer: Any) -> Optimizes:
    """Take Accelerate's wrapper off an optimiser.

    Args:
        optimizer: with or without it.

    Returns:
        the torch optimiser.
    """
    wrapper = needed("accelerate.optimizer", "hf").AcceleratedOptimizer
    while isinstance(optimizer, wrapper):
        optimizer = optimizer.optimizer
    inner: Optimizes = optimizer
    return inner
