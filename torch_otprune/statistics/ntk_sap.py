"""What each weight adds to the trace of the tangent kernel, by perturbing all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.statistics.sensitivity import gradients
from torch_otprune.structure.forward import (
    evaluating,
    flat_tensors,
    map_tensors,
    outside_inference,
    run,
)
from torch_otprune.structure.layers import Conv, is_dense

__all__ = ["sap_masks", "sap_scores", "weights_of"]


def weights_of(model: nn.Module) -> tuple[str, ...]:
    """List the parameters that single weights are taken from: of dense layers and convolutions.

    Args:
        model: any module.

    Returns:
        names of parameters, each once.
    """
    layers = (m for m in model.modules() if is_dense(m) or isinstance(m, Conv))
    own = {id(m.weight) for m in layers}
    return tuple(name for name, p in model.named_parameters() if id(p) in own)


def sap_scores(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    masks: Mapping[str, Tensor] | None = None,
    eps: float = 0.01,
    passes: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every weight by how much its mask changes the output's answer to a random nudge.

    `|d/dm_j E |f(x; w m) - f(x; (w + eps u) m)|^2|` with normal `u`, which to first order is
    `eps^2` times what the weight's mask does to the trace of the tangent kernel.

    Every nudge is tried on all batches, and the sign is dropped behind the sum over nudges,
    batches and ranks: how the samples are divided among batches and ranks does not matter.

    Args:
        model: any module, evaluated as in inference; left as it was.
        batches: as the model takes them; on every rank its own.
        masks: weights that are still there, by parameter; None is all.
        eps: size of the nudge.
        passes: nudges.
        seed: of the nudges.

    Returns:
        one tensor per parameter of `weights_of`, zero where a weight is gone; on all ranks alike.

    Raises:
        CalibrationError: if a score is not finite, or no output depends on the weights.

    Source: Wang, Li & Sun 2023, "NTK-SAP", equation 7. Here at any weights and on any data:
        at initialisation and on noise it is theirs.
    """
    found, generator = _nothing(model), torch.Generator("cpu").manual_seed(seed)
    for _ in range(passes):
        _add_(found, model, batches, masks, eps=eps, nudge=_nudge(model, generator))
    return _settled(found)


def _nothing(model: nn.Module) -> dict[str, Tensor]:
    """Start with scores of zero."""
    return {
        n: torch.zeros_like(model.get_parameter(n), dtype=torch.float64) for n in weights_of(model)
    }


def _nudge(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a number per weight."""
    shapes = {n: model.get_parameter(n).shape for n in weights_of(model)}
    return {n: torch.randn(s, generator=generator, device="cpu") for n, s in shapes.items()}


def _settled(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum up over all ranks, then drop the signs: a share of the sum says nothing by its size."""
    all_sum_(list(found.values()))
    return {n: _checked(n, t.abs()) for n, t in found.items()}


def _add_(
    found: dict[str, Tensor],
    model: nn.Module,
    batches: Sequence[Any],
    masks: Mapping[str, Tensor] | None,
    *,
    eps: float,
    nudge: Mapping[str, Tensor],
) -> None:
    """Add what one nudge says on this rank's batches."""
    with outside_inference(), evaluating(model), gradients(model):
        for batch in batches:
            slopes = _slopes(model, batch, masks, eps=eps, nudge=nudge)
            for name, slope in slopes.items():
                found[name] += slope


def _slopes(
    model: nn.Module,
    batch: Any,
    masks: Mapping[str, Tensor] | None,
    *,
    eps: float,
    nudge: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Differentiate one answer by all masks: the chain rule through both networks."""
    names, own = tuple(nudge), {n: p.detach() for n, p in model.named_parameters()}
    keep = {n: torch.ones_like(own[n]) if masks is None else masks[n].to(own[n]) for n in names}
    nudged = {n: own[n] + eps * u.to(own[n]) for n, u in nudge.items()}
    plain = {n: (own[n] * keep[n]).requires_grad_() for n in names}
    moved = {n: (nudged[n] * keep[n]).requires_grad_() for n in names}
    whole = _Whole(model)
    one, two = (_outputs(whole, batch, weights) for weights in (plain, moved))
    gap = torch.stack([(a - b).square().sum() for a, b in zip(one, two, strict=True)]).sum()
    if not gap.requires_grad:
        raise CalibrationError(
            "no output depends on the weights.",
            where=f"NTK-SAP on {type(model).__name__}",
            fix="check that forward is differentiable and returns floating tensors.",
        )
    leaves = [*plain.values(), *moved.values()]
    given = torch.autograd.grad(gap, leaves, allow_unused=True)
    slopes = [torch.zeros_like(x) if s is None else s for s, x in zip(given, leaves, strict=True)]
    sides = zip(names, slopes[: len(names)], slopes[len(names) :], strict=True)
    return {n: (a * own[n] + b * nudged[n]).double() * (keep[n] != 0) for n, a, b in sides}


class _Whole(nn.Module):
    """A model that takes a whole batch, for a functional call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, batch: Any) -> Any:
        """Run it."""
        return run(self.model, batch)


def _outputs(whole: nn.Module, batch: Any, weights: Mapping[str, Tensor]) -> list[Tensor]:
    out = functional_call(whole, {f"model.{n}": t for n, t in weights.items()}, (batch,))
    return [t for t in flat_tensors(out) if t.is_floating_point()]


def _checked(name: str, score: Tensor) -> Tensor:
    if not bool(torch.isfinite(score).all()):
        raise CalibrationError(
            "a score is NaN or infinite.",
            where=f"NTK-SAP, parameter '{name}'",
            fix="look for NaN or infinity in the weights or the calibration data.",
        )
    return score


def sap_masks(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    density: float,
    rounds: int = 20,
    passes: int = 1,
    eps: float = 0.01,
    restart: Callable[[nn.Module], None] | None = None,
    noise: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Thin the weights out in rounds, each time scoring those that are left.

    Args:
        model: any module; left as it was.
        batches: as the model takes them.
        density: share of the weights that stays, over all layers together.
        rounds: how many; the density falls by the same factor in each.
        passes: per round: new nudges, one per batch, and with `restart` new weights.
        eps: size of a nudge.
        restart: draws the weights of a copy anew before every pass, in place, as published; None
            scores the weights as they are.
        noise: whether normal numbers of the batches' shapes take the place of floating data, as
            published; batch-norms then take their statistics from these.
        seed: of all draws.

    Returns:
        one boolean tensor per parameter of `weights_of`: where it stays; on all ranks alike.

    Raises:
        CalibrationError: if the density is not in (0, 1], or a score is not finite.

    Source: Wang, Li & Sun 2023, algorithm 1.

    Limits: a layer may lose all weights; scored at initialisation, what matters is mostly how
    many weights each layer keeps (Frankle et al. 2021).
    """
    if not 0 < density <= 1:
        raise CalibrationError(
            f"a density of {density} keeps no weights, or more than there are.",
            where="sap_masks, argument density",
            fix="pass a share of at most 1 and above 0.",
        )
    copy = deepcopy(model)
    masks = {n: torch.ones_like(copy.get_parameter(n), dtype=torch.bool) for n in weights_of(copy)}
    total = sum(m.numel() for m in masks.values())
    for number in range(1, rounds + 1):
        score = _nothing(copy)
        for again in range(passes):
            turn = seed + number * passes + again
            with _seeded(turn):
                if restart is not None:
                    restart(copy)
                data = [_noise(batch) for batch in batches] if noise else batches
                if restart is not None or noise:
                    _settle_norms_(copy, data, masks)
            generator = torch.Generator("cpu").manual_seed(turn)
            for batch in data:  # a nudge for each, as published: no batch is run twice
                nudge = _nudge(copy, generator)
                _add_(score, copy, [batch], masks, eps=eps, nudge=nudge)
        kept = max(round(total * density ** (number / rounds)), 1)
        masks = _largest(_settled(score), masks, kept)
    return masks


def _largest(
    score: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Keep the best of all layers together; what is gone stays gone, ties go by place."""
    every = torch.cat([score[n].flatten().where(m.flatten(), -1) for n, m in masks.items()])
    flat = torch.zeros_like(every, dtype=torch.bool)
    flat[every.argsort(descending=True, stable=True)[:count]] = True
    parts = flat.split([m.numel() for m in masks.values()])
    both = zip(masks.items(), parts, strict=True)
    return {n: part.view_as(m) & m for (n, m), part in both}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let draws depend on a seed alone, and leave the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _noise(batch: Any) -> Any:
    return map_tensors(batch, lambda t: torch.randn_like(t) if t.is_floating_point() else t)


@torch.no_grad()
def _settle_norms_(model: nn.Module, batches: Sequence[Any], masks: Mapping[str, Tensor]) -> None:
    """Give batch-norms the statistics of the masked network on these batches."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    kept = [(m.training, m.momentum) for m in norms]
    masked = {n: model.get_parameter(n) * masks[n] for n in masks}
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.training, norm.momentum = True, None  # the plain mean over batches
            for batch in batches:
                functional_call(
                    _Whole(model), {f"model.{n}": t for n, t in masked.items()}, (batch,)
                )
    finally:
        for norm, (training, momentum) in zip(norms, kept, strict=True):
            norm.training, norm.momentum = training, momentum
