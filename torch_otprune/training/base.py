"""The contract of a penalty: what goes into a block and what comes out, in; one number, out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from torch_otprune.policy.base import problem
from torch_otprune.policy.registry import PENALTIES, Setting

__all__ = ["Memory", "Penalty", "register", "wide"]

register = PENALTIES.register
_STRIDE = 1_000_003  # a prime, so that steps and names do not meet in one seed


class Memory:
    """What a penalty knows about one block from earlier steps.

    What a forward pass finds is put aside and only counts from the next step on, so that the
    penalty of one step is the same however often it is computed.

    Args:
        seed: of the block's random draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.steps = seed, 0
        self._kept: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}

    def recall(self, name: str, like: Tensor, columns: int) -> Tensor | None:
        """Bring back what was learnt at the last step.

        Args:
            name: of the entry.
            like: gives the number of rows, the device and the type.
            columns: how many are wanted.

        Returns:
            None where there is nothing, or the block's shape has changed since.
        """
        kept = self._kept.get(name)
        if kept is None or kept.shape != (like.shape[1], columns):
            return None
        return kept.to(like)

    def learn(self, name: str, value: Tensor) -> None:
        """Put aside what the next step shall know."""
        self._fresh[name] = value.detach()

    def draw(self, like: Tensor, columns: int) -> Tensor:
        """Draw Gaussian numbers, the same ones at the same step of the same seed.

        Args:
            like: samples x features; gives the features, the device and the type.
            columns: how many vectors.

        Returns:
            features x columns. The numbers differ between kinds of device.
        """
        generator = torch.Generator(like.device)
        generator.manual_seed((self.seed * _STRIDE + self.steps) % 2**63)
        shape = (like.shape[1], columns)
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    def commit(self) -> None:
        """End the step: what was put aside counts from now on."""
        self._kept.update(self._fresh)
        self._fresh.clear()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Write what was learnt, as plain values and tensors."""
        return {"seed": self.seed, "steps": self.steps, "kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote."""
        self.seed, self.steps = int(state["seed"]), int(state["steps"])
        self._kept, self._fresh = dict(state["kept"]), {}


class Penalty(Setting, ABC):
    """A pull on blocks while they are trained. A subclass is one file."""

    weight: Literal["auto"] | float = Field(
        default="auto",
        description="factor of the penalty in the loss; `auto` follows the size of the gradients",
    )
    fraction: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description="with `auto`: the penalty's gradient as a share of the task's, in norm",
    )
    every: int = Field(
        default=20, ge=1, description="with `auto`: steps between two measurements of gradients"
    )
    total: int | None = Field(
        default=None, ge=1, description="optimiser steps of the whole training; null: no ramp"
    )
    ramp: float = Field(
        default=0.1, ge=0, le=1, description="share of `total` in which the weight grows from 0"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.weight == "auto":
            return self
        if not 0 <= self.weight < float("inf"):
            raise problem(
                f"weight is {self.weight}.", fix="give a finite number, 0 or more.", key="weight"
            )
        for name in ("fraction", "every"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise problem(
                    f"{name} only counts with weight 'auto', and weight is {self.weight}.",
                    fix=f"drop {name}, or set the weight to 'auto'.",
                    key=name,
                )
        return self

    @abstractmethod
    def value(self, x: Tensor, y: Tensor, memory: Memory) -> Float[Tensor, ""]:
        """Measure one block on one batch.

        Args:
            x: what went into the block, samples first, in any floating type.
            y: what came out.
            memory: what earlier steps learnt about this block.

        Returns:
            a number not below zero, differentiable in x and y; 0 where the block can go.
        """


def wide(x: Tensor) -> Tensor:
    """Return x in float32 or float64: half precision is too coarse for differences."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
