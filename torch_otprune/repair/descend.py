"""Gradient steps of a cut network towards the dense one: what learns, how fast, which are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.repair.goals import Goals, Piece, Taps, loss, off
from torch_otprune.statistics.reduce import all_sum_

__all__ = ["Descent", "learning", "pace", "steps_left"]

_SETTLED = 8  # steps before the pace is trusted to tell how many there is time for


@dataclass
class Descent:
    """A cut network on its way.

    Args:
        pupil: taps of the cut model.
        goals: of the dense one.
        held: batches that no step sees.
        live: what learns.
        half: whether forward and backward passes of the steps run in bfloat16.
        project: brings the weights back, after every step, to where they may be.
    """

    pupil: Taps
    goals: Goals
    held: Sequence[Any]
    live: Sequence[nn.Parameter]
    half: bool = False
    project: Callable[[], None] | None = None
    best: float = field(init=False, default=float("inf"))
    kept: list[Tensor] = field(init=False, default_factory=list)

    def run_(
        self,
        pieces: Sequence[Piece],
        generator: torch.Generator,
        *,
        steps: int,
        rate: float,
        warmup: float,
        checks: int,
        seconds: float,
        outputs: float,
        progress: Callable[[int], None],
    ) -> int:
        """Take the steps; the weights that held-out samples like best stay.

        Args:
            pieces: what to learn from; each comes up once before any comes up again.
            generator: of their order.
            steps: how many.
            rate: Adam's peak step size.
            warmup: share of the steps in which it rises.
            checks: how often held-out samples are asked.
            seconds: time for it; the schedule shrinks to what there is time for.
            outputs: weight of the network's outputs.
            progress: told how many steps are done.

        Returns:
            how many steps there was time for.
        """
        start, done, order = time.monotonic(), 0, list[int]()
        optimiser = torch.optim.Adam(self.live, lr=rate)
        self.check()
        while (left := steps_left(steps, done, time.monotonic() - start, seconds)) > 0:
            order = order or torch.randperm(len(pieces), generator=generator, device="cpu").tolist()
            for group in optimiser.param_groups:
                group["lr"] = rate * pace(done, done + left, warmup)
            self._step(optimiser, pieces, order.pop(), outputs=outputs)
            done += 1
            if done * checks // steps > (done - 1) * checks // steps and done < steps:
                self.check()
            progress(done)
        self.check()
        self.restore_()
        return done

    def _step(
        self,
        optimiser: torch.optim.Optimizer,
        pieces: Sequence[Piece],
        number: int,
        *,
        outputs: float,
    ) -> None:
        batch = pieces[number].take()
        with self._precision():
            goal = self.goals.of(("train", number), batch)
            got = self.pupil.show(batch)
        total = loss(goal, got, batch, outputs=outputs)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        if self.project is not None:
            self.project()
        torch.clear_autocast_cache()  # the caller's, if any, holds the old weights

    def _precision(self) -> AbstractContextManager[object]:
        if not self.half:
            return nullcontext()
        return torch.autocast(self.live[0].device.type, dtype=torch.bfloat16)

    def distance(self, *, together: bool) -> float:
        """Measure how far held-out outputs are from the dense ones.

        Args:
            together: whether to sum over all ranks, which then all must ask.

        Returns:
            squared error over squared reference; padding does not count.
        """
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        for number, batch in enumerate(self.held):
            goal = self.goals.of(("held", number), batch)
            with torch.no_grad():
                sums += off(goal.ends, self.pupil.show(batch).ends, batch)
        if together:
            all_sum_([sums])
        return float(sums[0] / sums[1].clamp_min(1e-300))

    def check(self) -> None:
        """Remember the weights if held-out samples like them better than all before."""
        found = self.distance(together=False)  # ranks may run out of time at different steps
        if found < self.best or not self.kept:
            self.best, self.kept = found, [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def restore_(self) -> None:
        """Go back to the best weights."""
        for parameter, old in zip(self.live, self.kept, strict=True):
            parameter.copy_(old)
        torch.clear_autocast_cache()


def steps_left(steps: int, done: int, spent: float, seconds: float) -> int:
    """Say how many steps there are still to take.

    Args:
        steps: wanted in all.
        done: taken.
        spent: seconds, for these.
        seconds: allowed.

    Returns:
        what is wanted, or what there is time for at the pace so far, if that is less.
    """
    if spent >= seconds:
        return 0
    if done < _SETTLED:
        return steps - done
    return min(steps - done, int((seconds - spent) * done / max(spent, 1e-9)))


def pace(done: int, steps: int, warmup: float) -> float:
    """Scale the step size: up in a line, down along half a cosine wave.

    Args:
        done: steps taken.
        steps: in all.
        warmup: share of them on the way up.

    Returns:
        a factor above 0, at most 1.
    """
    ramp = warmup * steps
    if done < ramp:
        return (done + 1) / (ramp + 1)
    return 0.5 * (1 + cos(pi * (done - ramp) / (steps - ramp)))


@contextmanager
def learning(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let parameters learn; flags and gradients come back afterwards.

    Tables of embeddings stay: a calibration set meets few of their rows, and these would move away
    from the others.

    Args:
        model: any module.

    Yields:
        the floating-point parameters that learn.
    """
    every = list(model.parameters())
    tables = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        for p in m.parameters(recurse=False)
    }
    before = [(p, p.requires_grad, p.grad) for p in every]
    live = [p for p in every if p.is_floating_point() and id(p) not in tables]
    try:
        for p in every:
            p.requires_grad_(False)
            p.grad = None
        for p in live:
            p.requires_grad_(True)
        yield live
    finally:
        for p, flag, gradient in before:
            p.requires_grad_(flag)
            p.grad = gradient
