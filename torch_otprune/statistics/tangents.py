"""How much of the network's tangent kernel every parameter holds: what training could still use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.statistics.filters import module_at
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.statistics.sensitivity import (
    chunks,
    generators_of,
    gradients,
    own_signs,
    slopes_of,
)
from torch_otprune.structure.forward import evaluating, flat_tensors, outside_inference, run
from torch_otprune.structure.graph import Group, Member
from torch_otprune.structure.layers import Conv, axes, axis_of, leaf_of

__all__ = ["Tangent", "Tangents", "tangent", "tangents", "tangents_quote"]


@dataclass(frozen=True)
class Tangents:
    """The diagonal of the output-Fisher matrix: `sum over samples of |df/dw|^2`, weight by weight.

    Args:
        squares: by parameter, in float64 on the CPU; the sum of all is the kernel's trace.
        gains: mean square of every parameter: times it, squares no longer depend on how large
            a layer's weights are where something behind divides by their size.
    """

    squares: Mapping[str, Tensor]
    gains: Mapping[str, float]

    @property
    def trace(self) -> float:
        """Sum up all squares."""
        return sum(float(s.sum()) for s in self.squares.values())

    @property
    def free(self) -> float:
        """Sum up all squares, each parameter's by its size."""
        return sum(float(s.sum()) * self.gains[name] for name, s in self.squares.items())


@dataclass(frozen=True)
class Tangent:
    """What the parameters of each unit hold of the network's tangent kernel.

    Args:
        raw: share of the kernel's trace.
        free: the same with every layer's gradients times the size of its weights.
        missed: members whose parameters have no gradient of their own.
    """

    raw: Float[Tensor, " units"]
    free: Float[Tensor, " units"]
    missed: tuple[str, ...] = ()


def tangents(model: nn.Module, batches: Sequence[Any], *, draws: int, seed: int) -> Tangents:
    """Measure every parameter's squared gradients, sample by sample, over all ranks.

    With random signs `v`, the expectation of `|J'v|^2` is the squared norm of the output's
    Jacobian; each sample is run by itself, so that no two of them mix, whatever the batches. A
    sample's signs are its own, drawn from what it holds: errors then cancel between samples.

    Args:
        model: any module; left as it was, evaluated as in inference.
        batches: a few batches, this rank's own.
        draws: random sign vectors.
        seed: chooses them.

    Returns:
        the sums, the same on every rank.

    Source: Hutchinson 1990 for the estimator.
    """
    named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    squares = {n: torch.zeros(p.shape, dtype=torch.float64, device="cpu") for n, p in named.items()}
    with outside_inference(), evaluating(model), gradients(model):
        for piece in (piece for batch in batches for piece in chunks(batch, 1)):
            outputs = [t for t in flat_tensors(run(model, piece)) if t.requires_grad]
            generators = generators_of(piece, seed)
            for draw in range(draws if outputs else 0):
                drawn = [own_signs(t, generators) for t in outputs]
                found = slopes_of(outputs, [*named.values()], drawn, more=draw + 1 < draws)
                for name, slope in zip(named, found, strict=True):
                    if slope is not None:
                        squares[name] += slope.detach().double().square().cpu() / draws
    all_sum_(squares.values())
    sizes = {n: float(p.detach().double().square().mean()) for n, p in named.items() if p.numel()}
    return Tangents(squares, {n: sizes.get(n, 0.0) for n in named})


def tangents_quote(model: nn.Module) -> int:
    """Tell how much memory `tangents` takes, before the first batch.

    Args:
        model: any module.

    Returns:
        bytes.
    """
    return 8 * sum(p.numel() for p in model.parameters() if p.is_floating_point())


def tangent(model: nn.Module, group: Group, found: Tangents) -> Tangent:
    """Add up the squares of all that goes when a unit goes: what writes it and what reads it.

    Args:
        model: the model.
        group: the group.
        found: what was measured.

    Returns:
        shares by unit.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    raw = torch.zeros(group.units, dtype=torch.float64, device="cpu")
    free, missed = raw.clone(), list[str]()
    for member in group.members:
        parts = list(_parts(model, member, names, found))
        for one, sized in parts:
            raw += one[member.index].flatten(1).sum(1)
            free += sized[member.index].flatten(1).sum(1)
        if not parts and member.side in ("in", "out"):
            missed.append(member.path)
    return Tangent(
        raw / max(found.trace, 1e-300), free / max(found.free, 1e-300), tuple(dict.fromkeys(missed))
    )


_Part = tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]
"""Squares by channel, and the same times the size of the layer's weights."""


def _parts(
    model: nn.Module, member: Member, names: Mapping[int, str], found: Tangents
) -> Iterator[_Part]:
    """Sum up, parameter by parameter, what carries a member's channels."""
    module = module_at(model, member.path)
    if module is None:
        leaf = leaf_of(model, member.path)
        yield from _along(names.get(id(leaf)), found, axis_of(member.path, leaf.shape))
    elif member.side == "expert":
        yield from _experts(module, names, found)
    elif isinstance(module, Conv) and module.groups > 1 and member.side == "in":
        yield from _grouped(module, names, found)
    else:
        for name, axis in axes(module, member.side):
            yield from _along(names.get(id(getattr(module, name))), found, axis)


def _along(name: str | None, found: Tangents, axis: int) -> Iterator[_Part]:
    if name is not None and name in found.squares:
        squares = found.squares[name].movedim(axis, 0)
        each = squares.reshape(len(squares), -1).sum(1)
        yield each, each * found.gains[name]


def _experts(module: nn.Module, names: Mapping[int, str], found: Tangents) -> Iterator[_Part]:
    """Sum up every expert of a list."""
    both = []
    for child in module.children():
        own = [n for p in child.parameters() if (n := names.get(id(p))) in found.squares]
        raw = [found.squares[n].sum() for n in own if n is not None]
        free = [s * found.gains[n] for n, s in zip(own, raw, strict=True) if n is not None]
        both.append((sum(map(float, raw)), sum(map(float, free))))
    table = torch.tensor(both, dtype=torch.float64, device="cpu").reshape(-1, 2)
    yield table[:, 0], table[:, 1]


def _grouped(module: nn.Module, names: Mapping[int, str], found: Tangents) -> Iterator[_Part]:
    """Sum up by what each filter of a grouped convolution reads."""
    assert isinstance(module, Conv)
    name = names.get(id(module.weight))
    if name is not None and name in found.squares:
        squares = found.squares[name]
        if module.transposed:
            each = squares.flatten(1).sum(1)
        else:
            each = squares.flatten(2).sum(2).unflatten(0, (module.groups, -1)).sum(1).flatten()
        yield each, each * found.gains[name]
