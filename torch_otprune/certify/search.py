"""Look for two inputs between which a property fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.certify.inputs import asked, ran
from torch_otprune.certify.result import Kind, Violation
from torch_otprune.errors import OTPruneError
from torch_otprune.structure.forward import (
    Call,
    called,
    first_line,
    flat_tensors,
    head,
    map_tensors,
)

__all__ = ["Looked", "Search", "looked"]

_CHUNK = 1024  # pairs run at a time
_CLIMBED = 64  # pairs that gradient ascent starts from
_ROUNDING = 1e-9  # of the outputs' size, in float64
_TINY = 1e-13  # outputs that cancel leave this much of nothing
_NEAR = "inputs near the example, in float64"
_SCALES = (0.1, 1.0, 5.0)


@dataclass(frozen=True)
class Search:
    """How long to look.

    Args:
        pairs: random pairs.
        steps: of gradient ascent from the worst of them.
        seed: fixes the pairs.
    """

    pairs: int = 20_000
    steps: int = 200
    seed: int = 0


Looked = tuple[Violation | None, int] | str
"""The worst violation and how many pairs were tried, or why none could be."""


def looked(
    model: nn.Module, batch: Any, wrt: int | str, *, kinds: Sequence[Kind], search: Search
) -> dict[Kind, Looked]:
    """Look for violations of what is not proved.

    Args:
        model: any module.
        batch: the example; its samples tell where to look.
        wrt: the input that is asked about.
        kinds: what is not proved.
        search: how long.

    Returns:
        what was found of each.
    """
    if not kinds:
        return {}
    try:
        run, around = _runner(model, batch, wrt)
        return {kind: violation(run, around, kind, search) for kind in kinds}
    except (OTPruneError, RuntimeError, TypeError) as error:  # or it cannot be copied
        return dict.fromkeys(kinds, first_line(error).rstrip("."))


def violation(
    run: Callable[[Tensor], Tensor], samples: Tensor, kind: Kind, search: Search
) -> tuple[Violation | None, int]:
    """Look for a violation, at random and then by gradient ascent.

    Args:
        run: maps a batch of inputs to rows of outputs, in float64.
        samples: inputs to look around, samples first.
        kind: `convex` or `monotone`.
        search: how long.

    Returns:
        the worst violation, None where none was found, and how many pairs were compared.
    """
    generator = torch.Generator().manual_seed(search.seed)
    worst: tuple[float, Tensor, Tensor] | None = None
    bad, seen, starts = 0, 0, list[tuple[Tensor, Tensor]]()
    while seen < search.pairs:
        a, b = _drawn(samples, kind, min(_CHUNK, search.pairs - seen), generator)
        with torch.no_grad():
            margin = _margin(run, a, b, kind)
        seen, bad = seen + len(a), bad + int((margin > 0).sum())
        at = int(margin.argmax())
        if worst is None or float(margin[at]) > worst[0]:
            worst = float(margin[at]), a[at], b[at]
        if len(starts) * 8 < _CLIMBED:
            top = margin.topk(min(8, len(margin))).indices
            starts.append((a[top], b[top]))
    if not bad and search.steps and starts:
        pairs = [torch.cat(side) for side in zip(*starts, strict=True)]
        worst = _climbed(run, pairs[0], pairs[1], kind, steps=search.steps)
    if worst is None or worst[0] <= 0:
        return None, seen
    return _worded(run, worst[1], worst[2], kind, share=bad / max(seen, 1)), seen


def _drawn(
    samples: Tensor, kind: Kind, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw pairs near the samples and far from them."""
    spread = samples.std(0, correction=0) if len(samples) > 1 else torch.zeros_like(samples[0])
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))

    def draw() -> Tensor:
        at = torch.randint(len(samples), (count,), generator=generator)
        scale = torch.tensor(_SCALES, dtype=torch.float64)
        size = scale[torch.randint(len(_SCALES), (count,), generator=generator)]
        noise = torch.randn(count, *samples.shape[1:], generator=generator, dtype=torch.float64)
        return samples[at] + noise * spread * size.reshape(-1, *[1] * (samples.dim() - 1))

    a, b = draw(), draw()
    if kind == "monotone":  # moves up, in some coordinates only
        keep = torch.rand(b.shape, generator=generator) < 0.5
        b = a + (b - a).abs() * keep
    return a, b


def _sides(
    run: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, kind: Kind
) -> tuple[Tensor, Tensor]:
    """Give what was found and what is allowed, one row per pair."""
    first, second = run(a), run(b)
    if kind == "monotone":
        return first, second
    return run((a + b) / 2), (first + second) / 2


def _margin(run: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, kind: Kind) -> Tensor:
    """Measure the worst output's violation per pair, relative to the outputs; rounding is none."""
    found, allowed = _sides(run, a, b, kind)
    size = found.abs() + allowed.abs()
    margin = (found - allowed - _TINY) / size.clamp_min(1e-12) - _ROUNDING
    return margin.nan_to_num(nan=-1.0).amax(1)


def _climbed(
    run: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, kind: Kind, *, steps: int
) -> tuple[float, Tensor, Tensor]:
    """Raise the violation by gradient steps."""
    base, up = a.clone(), (b - a).clone()
    step = 0.02 * float(up.abs().mean().clamp_min(1e-6))
    best = (-1.0, a[0], b[0])
    base.requires_grad_(True)
    up.requires_grad_(True)
    optimiser = torch.optim.Adam([base, up], lr=step)
    for _ in range(steps):
        move = up.abs() if kind == "monotone" else up
        margin = _margin(run, base, base + move, kind)
        now = margin.detach()
        at = int(now.argmax())
        if float(now[at]) > best[0]:
            best = float(now[at]), base[at].detach().clone(), (base + move)[at].detach().clone()
        optimiser.zero_grad()
        margin.sum().neg().backward()
        optimiser.step()
    return best


def _worded(
    run: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, kind: Kind, *, share: float
) -> Violation:
    with torch.no_grad():
        found, allowed = _sides(run, a[None], b[None], kind)
    size = (found.abs() + allowed.abs()).clamp_min(1e-12)
    at = int(((found - allowed) / size).argmax())
    return Violation(
        a=tuple(a.flatten().tolist()),
        b=tuple(b.flatten().tolist()),
        output=at,
        found=float(found[0, at]),
        allowed=float(allowed[0, at]),
        share=share,
    )


def _runner(
    model: nn.Module, batch: Any, wrt: int | str
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Prepare to run a copy in float64 on many inputs at once."""
    twin = copy.deepcopy(model).double().eval()
    call = called(model, batch)
    near = asked(call, wrt)
    one = called(model, head(batch, 1))
    place = next(
        i for i, t in enumerate(flat_tensors([one.args, one.kwargs])) if t is asked(one, wrt)
    )

    def run(x: Tensor) -> Tensor:
        count = iter(range(10**6))

        def fill(t: Tensor) -> Tensor:
            if next(count) == place:
                return x.clone()  # forward may write it
            t = t.double() if t.is_floating_point() else t
            wide = t.expand(len(x), *t.shape[1:]) if t.dim() and len(t) == 1 else t
            return wide.clone()

        args, kwargs = map_tensors([one.args, one.kwargs], fill)
        out = [
            t for t in flat_tensors(ran(twin, Call(args, kwargs), _NEAR)) if t.is_floating_point()
        ]
        if len(x) > 1 and not all(t.dim() and len(t) == len(x) for t in out):
            return alone(x)
        return torch.cat([t.reshape(len(x), -1) for t in out], 1)

    def alone(x: Tensor) -> Tensor:
        return torch.cat([run(row) for row in x.split(1)])

    values = near.detach().double()
    return (alone if _mixes(run, alone, values[:1]) else run), values.cpu()


_Run = Callable[[Tensor], Tensor]


@torch.no_grad()
def _mixes(run: _Run, alone: _Run, row: Tensor) -> bool:
    """Tell whether one sample changes what is said of another, as a mean over the batch does."""
    rows = torch.cat([row, 2 * row + 1, 1 - row])
    return not torch.allclose(run(rows), alone(rows), rtol=1e-7, atol=1e-12, equal_nan=True)
