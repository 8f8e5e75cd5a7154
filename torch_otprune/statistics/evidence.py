"""What is known about one group when its units are ranked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from torch_otprune.statistics.filters import Filters, filters, module_at
from torch_otprune.statistics.loose import flat_rows, stretches
from torch_otprune.statistics.moments import WIDE, Moments
from torch_otprune.statistics.patches import full_weight, supported, taps
from torch_otprune.statistics.sensitivity import Sensitivity
from torch_otprune.statistics.tangents import Tangent, Tangents, tangent
from torch_otprune.structure.graph import Graph, Group, Member
from torch_otprune.structure.layers import (
    BatchNorm,
    Conv,
    kernel,
    norm_behind,
)
from torch_otprune.structure.routing import around

__all__ = ["Consumer", "Evidence", "Learnt", "gather"]


@dataclass(frozen=True)
class Consumer:
    """One layer that reads the group.

    Args:
        path: the layer.
        weight: its weight on the group, by unit and tap; a tap is one kernel position of one
            of the unit's channels. Where the layer is not unfolded, a tap is a channel and
            each kernel position an output of its own.
        second: averaged products of what it reads; None without data. About the mean where a
            bias can absorb the mean.
        absorbs: whether a bias or batch-norm behind it absorbs a constant.
        feel: how much the network's squared output grows with a squared error in each of its
            output channels, per sample; ones where it was not measured.
        mean: average of what it reads; None without data.
        signals: some of what it reads, one row each; None where no criterion asked.
    """

    path: str
    weight: Float[Tensor, "out units taps"]
    second: Float[Tensor, "units taps units taps"] | None
    absorbs: bool
    feel: Float[Tensor, " out"]
    mean: Float[Tensor, "units taps"] | None = None
    signals: Float[Tensor, "rows units"] | None = None

    def felt(self) -> Float[Tensor, "out units taps"]:
        """Scale the weight so that squared errors come in units of the network's output."""
        return self.weight * self.feel.sqrt()[:, None, None]


@dataclass(frozen=True)
class Learnt:
    """What soft masks came to, of the units of a group or of one block.

    Args:
        logits: of each mask; larger means keep.
        keep: what stays.
        note: what a reader of the plan should know about it.
    """

    logits: Float[Tensor, " units"]
    keep: Bool[Tensor, " units"]
    note: str = ""


@dataclass(frozen=True)
class Evidence:
    """One group, as a criterion sees it. Everything in float64.

    Args:
        name: the group.
        units: how many.
        producers: what writes each unit: rows of the producers' weights, side by side.
        scales: batch-norm scales on the way, one column per norm; None without norms.
        consumers: who reads the units.
        taylor: mean squared first-order change of the output when a unit is zeroed; None
            without data.
        seed: the policy's seed.
        filters: what writes each unit, layer by layer, batch-norms folded in.
        tangent: what its parameters hold of the network's tangent kernel; None where no
            criterion asked.
        learnt: what training decided; None where it decided nothing.
    """

    name: str
    units: int
    producers: Float[Tensor, "units features"]
    scales: Float[Tensor, "units norms"] | None
    consumers: tuple[Consumer, ...]
    taylor: Float[Tensor, " units"] | None
    seed: int
    filters: tuple[Filters, ...] = ()
    tangent: Tangent | None = None
    learnt: Learnt | None = None


def gather(
    model: nn.Module,
    graph: Graph,
    group: Group,
    *,
    moments: dict[str, Moments],
    sensitivity: Sensitivity | None,
    feel: bool = True,
    ties: frozenset[str] = frozenset(),
    signals: Mapping[str, Tensor] | None = None,
    tangents: Tangents | None = None,
    seed: int,
) -> Evidence:
    """Lay out all that is known about one group.

    Args:
        model: the dense model.
        graph: its analysis.
        group: the group.
        moments: observed second moments, by consumer.
        sensitivity: what the output feels; None if it was not measured.
        feel: whether consumers' errors are weighted by it.
        ties: modules that share tensors, as `layers.shared` lists them.
        signals: rows of what consumers read, by consumer.
        tangents: squared gradients of every parameter; None where no criterion asked.
        seed: the policy's seed.

    Returns:
        the evidence.
    """
    felt = sensitivity if feel else None
    own = None if tangents is None else tangent(model, group, tangents)
    if group.kind == "experts":
        held, reader = _contents(model, group), _mixture(group, moments, felt)
        return Evidence(group.name, group.units, held, None, (reader,), None, seed, (), own)
    readers = tuple(
        _heard(consumer, m, signals or {})
        for m in group.consumers
        for consumer in _consumers(model, graph, m, moments, felt, ties=ties)
    )
    return Evidence(
        group.name,
        group.units,
        _producers(model, group),
        _scales(model, group),
        readers,
        _taylor(group, sensitivity),
        seed,
        filters(model, graph, group, ties=ties),
        own,
    )


def _heard(consumer: Consumer, member: Member, signals: Mapping[str, Tensor]) -> Consumer:
    """Add what the consumer was heard reading; a unit's channels are rows of their own."""
    if consumer.path not in signals:
        return consumer
    heard = signals[consumer.path].double().cpu()[:, member.index]
    return replace(consumer, signals=heard.transpose(1, 2).flatten(0, 1))


def _consumers(
    model: nn.Module,
    graph: Graph,
    member: Member,
    moments: dict[str, Moments],
    sensitivity: Sensitivity | None,
    *,
    ties: frozenset[str],
) -> Iterator[Consumer]:
    if module_at(model, member.path) is None:
        yield from _loose(model, member, moments, sensitivity)
    else:
        yield _consumer(model, graph, member, moments, sensitivity, ties=ties)


def _unit_columns(member: Member, taps: int) -> Int[Tensor, "units taps"]:
    within = member.index[:, :, None] * taps + torch.arange(taps, device="cpu")
    return within.flatten(1)


def _consumer(
    model: nn.Module,
    graph: Graph,
    member: Member,
    moments: dict[str, Moments],
    sensitivity: Sensitivity | None,
    *,
    ties: frozenset[str],
) -> Consumer:
    module = model.get_submodule(member.path)
    bias = getattr(module, "bias", None)
    absorbs = bias is not None or norm_behind(model, graph, member.path, ties) is not None
    second = mean = None
    if member.path in moments:
        at = _unit_columns(member, taps(module))
        mean = moments[member.path].mean.cpu()[at]
        chosen = moments[member.path].second(centred=absorbs).cpu()[at.flatten()][:, at.flatten()]
        second = chosen.view(*at.shape, *at.shape)
    weight = full_weight(module).cpu()[:, _unit_columns(member, kernel(module))]
    feel = torch.ones(len(weight), dtype=torch.float64, device="cpu")
    if sensitivity is not None and (found := sensitivity.feel(member.path)) is not None:
        feel = found.cpu()
    if not supported(module):
        weight, feel = _untapped(module, weight, feel)
    return Consumer(member.path, weight, second, absorbs, feel, mean)


def _mixture(
    group: Group, moments: dict[str, Moments], sensitivity: Sensitivity | None
) -> Consumer:
    """Describe whoever adds experts up: what each contributes, as one number."""
    found, second = moments.get(group.name), None
    if found is not None:
        second = found.second(centred=False).cpu()[:, None, :, None]
    feel = torch.ones(1, dtype=torch.float64, device="cpu")
    path = around(group)
    if sensitivity is not None and path in sensitivity.felt:
        felt, spread = (t[path].sum().cpu() for t in (sensitivity.felt, sensitivity.spread))
        feel = (felt / spread.clamp_min(1e-30)).view(1)
    weight = torch.ones(1, group.units, 1, dtype=torch.float64, device="cpu")
    return Consumer(group.name, weight, second, absorbs=False, feel=feel)


def _contents(model: nn.Module, group: Group) -> Float[Tensor, "units features"]:
    """Lay out what each expert consists of, its router's rows aside."""
    parts = []
    for member in (m for m in group.members if m.side == "expert"):
        module = module_at(model, member.path)
        if module is not None:
            listed = module.children()
            rows = [torch.cat([p.flatten() for p in m.parameters()]).detach() for m in listed]
            parts.append(torch.stack(rows).double().cpu()[member.index].flatten(1))
        else:
            parts.append(flat_rows(model, member.path)[member.index].flatten(1))
    return torch.cat(parts, dim=1)


def _loose(
    model: nn.Module,
    member: Member,
    moments: dict[str, Moments],
    sensitivity: Sensitivity | None,
) -> Iterator[Consumer]:
    """Describe a consumer that is no layer of its own: one for whatever reads the same input."""
    weight = flat_rows(model, member.path).T
    slopes = sensitivity.slope(member.path) if sensitivity is not None else None
    for outs, second in _inputs(member.path, len(weight), moments):
        own = weight[outs]
        feel = torch.ones(len(own), dtype=torch.float64, device="cpu")
        if second is not None and slopes is not None:
            power = ((own @ second) * own).sum(1)
            feel = slopes[outs] / power.clamp_min(1e-30)
        if second is None and own.shape[1] > WIDE:
            yield Consumer(member.path, own[:, member.index], None, absorbs=False, feel=feel)
            continue
        # what nobody saw is taken as white, of size one, as it is behind a norm
        known = (
            torch.eye(weight.shape[1], dtype=own.dtype, device="cpu") if second is None else second
        )
        at, shape = member.index.flatten(), member.index.shape
        chosen = known[at][:, at].view(*shape, *shape)
        yield Consumer(member.path, own[:, member.index], chosen, absorbs=False, feel=feel)


def _inputs(
    path: str, outs: int, moments: dict[str, Moments]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Tell the parts of a parameter's outputs that read the same, and the moments of that."""
    found = list(stretches(path, moments))
    rows = max((own.count for _, _, own in found), default=0)  # a rare input weighs little
    every, told = torch.arange(outs, device="cpu"), list[tuple[list[Tensor], Moments]]()
    for number, count, own in found:
        part = every.view(count, -1)[number]
        same = (p for p, m in told if m.count == own.count and m.product.equal(own.product))
        if (parts := next(same, None)) is not None:
            parts.append(part)
        else:
            told.append(([part], own))
    for parts, own in told:
        yield torch.cat(parts), (own.product / rows).cpu()
    if not told:
        yield every, None


def _untapped(module: nn.Module, weight: Tensor, feel: Tensor) -> tuple[Tensor, Tensor]:
    """Treat the taps of a layer that is not unfolded as outputs of their own, uncorrelated."""
    count = kernel(module)
    weight = weight.unflatten(2, (-1, count)).permute(0, 3, 1, 2).flatten(0, 1)
    each = prod(module.stride) if isinstance(module, Conv) and module.transposed else 1
    return weight, feel.repeat_interleave(count) / each  # inputs are fewer than outputs


def _producers(model: nn.Module, group: Group) -> Tensor:
    parts = []
    for member in group.producers:
        module = module_at(model, member.path)
        if module is None:
            parts.append(flat_rows(model, member.path)[member.index].flatten(1))
            continue
        weight = full_weight(module).cpu()
        weight = weight.T if isinstance(module, nn.Embedding) else weight
        parts.append(weight[member.index].flatten(1))
    return torch.cat(parts, dim=1)


def _scales(model: nn.Module, group: Group) -> Tensor | None:
    found = [
        module.weight.detach().double().cpu()[member.index].mean(1)
        for member in group.members
        if member.side == "through"
        and isinstance(module := module_at(model, member.path), BatchNorm)
        and module.weight is not None
    ]
    return torch.stack(found, dim=1) if found else None


def _taylor(group: Group, sensitivity: Sensitivity | None) -> Tensor | None:
    if sensitivity is None:
        return None
    total = torch.zeros(group.units, dtype=torch.float64, device="cpu")
    for member in group.consumers:
        if member.path in sensitivity.inputs:
            total += sensitivity.inputs[member.path].cpu()[member.index].sum(1)
    return total / max(sensitivity.samples * sensitivity.draws, 1)
