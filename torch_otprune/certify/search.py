"""Look for two inputs between which a property fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_otprune.certify.result import Kind, Violation

__all__ = ["Search", "violation"]

_CHUNK = 1024  # pairs run at a time
_CLIMBED = 64  # pairs that gradient ascent starts from
_ROUNDING = 1e-9  # of the outputs' size, in float64
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
    margin = (found - allowed) / size.clamp_min(1e-12) - _ROUNDING
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
