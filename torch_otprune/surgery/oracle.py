"""Pruned equals masked: a cut must compute what the dense model does without the units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.plan.model import Cut, Drop, Slice
from torch_otprune.structure.forward import evaluating, first_line, flat_tensors, run
from torch_otprune.structure.layers import TokenNorm, bare
from torch_otprune.structure.mute import muted
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import cut_, merged, places, set_
from torch_otprune.surgery.exchange import exchange_

__all__ = ["compared", "disagreement", "gap", "masked"]


@contextmanager
def masked(model: nn.Module, cuts: Sequence[Cut], small: nn.Module | None = None) -> Iterator[None]:
    """Silence, at every consumer, the channels that the cuts would remove.

    A consumer's weights on what goes are zero meanwhile. A norm over channels of which some go is
    one over those that stay: it is taken from the cut model and runs on them alone.

    Args:
        model: the dense model.
        cuts: a plan's decisions.
        small: the cut model; needed where a norm loses some of the channels it takes together.

    Yields:
        nothing; weights are back and hooks are gone afterwards.
    """
    pieces, handles, old = merged(cuts), [], []
    try:
        for owner, name, value in _silenced(model, [p for p in pieces if p.side == "in"]):
            old.append((owner, name, getattr(owner, name)))
            set_(owner, name, value)
        for path, keep in _norms(model, pieces).items():
            assert small is not None, f"'{path}' can only be masked with the cut model at hand"
            hook = _NormOfKept(small.get_submodule(path), keep)
            handles.append(model.get_submodule(path).register_forward_hook(hook))
        yield
    finally:
        for owner, name, value in reversed(old):
            set_(owner, name, value)
        for handle in handles:
            handle.remove()


def _silenced(model: nn.Module, pieces: Sequence[Slice]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for piece in pieces:
        for owner, name, axis in places(model, piece):
            weight = getattr(owner, name).detach()
            mask = torch.zeros(piece.size, device="cpu")
            mask[list(piece.keep)] = 1
            shape = [1] * weight.dim()
            shape[axis] = weight.shape[axis]
            # a filter of a grouped convolution reads the same place of every group
            yield owner, name, weight * mask[: weight.shape[axis]].to(weight).view(shape)


def _norms(model: nn.Module, pieces: Sequence[Slice]) -> dict[str, Tensor]:
    """Find the norms that lose some of the numbers they take together, and what each keeps."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for piece in (p for p in pieces if p.side == "through"):
        path = piece.path if piece.path in modules else bare(piece.path)[0].rpartition(".")[0]
        module = modules[path]
        if isinstance(module, TokenNorm) or (piece.path not in modules and _is_norm(module)):
            found[path] = torch.tensor(piece.keep, device="cpu")
    return found


def _is_norm(module: nn.Module) -> bool:
    """Recognise a home-made norm: a leaf that says so and scales what it takes together."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


class _NormOfKept:
    """A hook that takes a norm over the channels that stay."""

    def __init__(self, norm: nn.Module, keep: Tensor) -> None:
        self.norm, self.keep = norm, keep

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        keep = self.keep.to(out.device)
        return torch.zeros_like(out).index_copy(-1, keep, self.norm(args[0].index_select(-1, keep)))


def disagreement(
    model: nn.Module, cuts: Sequence[Cut], example: Any, *, drops: Sequence[Drop] = ()
) -> float:
    """Cut a copy and compare it with the masked original on an example.

    Costs one copy of the model and two forward passes.

    Args:
        model: the dense model; left as it was.
        cuts: a plan's decisions.
        example: one batch.
        drops: blocks to take out as well.

    Returns:
        the largest difference relative to the largest output; infinity where the cut model
        does not run or its output has another shape.
    """
    return compared(model, cuts, example, drops=drops)[0]


def compared(
    model: nn.Module, cuts: Sequence[Cut], example: Any, *, drops: Sequence[Drop] = ()
) -> tuple[float, str]:
    """Measure the disagreement, and say what it is.

    Args:
        model: the dense model; left as it was.
        cuts: a plan's decisions.
        example: one batch.
        drops: blocks to take out as well.

    Returns:
        as `disagreement`, and one clause.
    """
    small = copied(model)
    cut_(small, cuts)
    exchange_(small, drops)
    with evaluating(model), torch.no_grad():
        with masked(model, cuts, small), muted(model, [drop.swaps[0] for drop in drops]):
            expected = flat_tensors(run(model, example))
        try:
            with evaluating(small):
                got = flat_tensors(run(small, example))
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            return float("inf"), f"without it the model does not run: {first_line(error)}"
    if [t.shape for t in expected] != [t.shape for t in got]:
        few, many = len(got), len(expected)
        change = "tensors of other shapes" if few == many else f"{few} tensors instead of {many}"
        return float("inf"), f"without it the model returns {change}"
    far = gap(expected, got)
    return far, f"cut and masked outputs differ by {far:.1e} of the largest output"


def gap(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Measure the largest difference between two lists of outputs.

    Args:
        expected: the reference.
        got: as many tensors of the same shapes.

    Returns:
        relative to the reference's largest entry; infinity where shapes differ.
    """
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    pairs = [
        (a, b) for a, b in zip(expected, got, strict=True) if a.is_floating_point() and a.numel()
    ]
    scale = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    worst = max((float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs), default=0.0)
    return worst / scale if scale else worst
