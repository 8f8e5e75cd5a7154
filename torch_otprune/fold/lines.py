"""Carry out what a plan says about activations: lines taken up, layers folded, all without data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.errors import PlanError, VerificationError
from torch_otprune.fold.chains import Layer, chains
from torch_otprune.fold.linear import TOKEN_NORMS, norm_line, rescaled
from torch_otprune.fold.modules import POOLS, describe, is_weighted
from torch_otprune.fold.pieces import composed, replacements
from torch_otprune.fold.stencil import diagonal
from torch_otprune.plan.model import Folding, Line, Plan
from torch_otprune.statistics.depth import SiteEvidence
from torch_otprune.structure.flow import flow
from torch_otprune.structure.forward import batch_size, evaluating, flat_tensors, run
from torch_otprune.structure.graph import Graph, Tail
from torch_otprune.structure.layers import BatchNorm, tensor
from torch_otprune.surgery.check import tolerance
from torch_otprune.surgery.cut import merged
from torch_otprune.surgery.oracle import gap

__all__ = ["Values", "changes", "linearize_", "lines_of", "refold_", "refolded", "surrogate"]

_STEADY = 1e-12  # variance below this share of the squared mean is rounding

Values = Mapping[str, tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]]
"""Activation to the slope and the shift of each channel."""


def surrogate(
    evidence: SiteEvidence, kind: str
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Find the line per channel that stands for an activation.

    Args:
        evidence: what went in and came out.
        kind: `affine`, `identity` or `on_off`.

    Returns:
        slopes and shifts in float64; a channel whose input never changed keeps its constant.

    Source: the best affine map in mean square, a = Cov(z, f(z)) / Var(z); `on_off` after Liao et
    al. 2025 (TLC), whose switch is the sign of the mean input.
    """
    if kind == "identity":
        return torch.ones_like(evidence.mean), torch.zeros_like(evidence.mean)
    if kind == "on_off":
        mean = evidence.mean if evidence.norm is None else evidence.norm[0]
        return (mean > 0).to(evidence.mean), torch.zeros_like(evidence.mean)
    # Rounding makes a constant vary by 1e-7 of itself in float32; its slope would be noise.
    varies = evidence.var > _STEADY * evidence.mean.square()
    slope = torch.where(varies, evidence.cov / torch.where(varies, evidence.var, 1.0), 0.0)
    return slope, evidence.out_mean - slope * evidence.mean


def lines_of(plan: Plan, evidence: Mapping[str, SiteEvidence]) -> Values:
    """Find the line of every activation that a plan makes linear, at the widths that are left.

    Args:
        plan: the decisions.
        evidence: what was seen in the dense model, by name.

    Returns:
        slopes and shifts by name.
    """
    kept = {p.path: torch.tensor(p.keep) for p in merged(plan.cuts) if p.side != "in"}
    found = {}
    for line in plan.lines:
        pair = surrogate(evidence[line.site], line.surrogate)
        at = kept.get(line.into or "")
        found[line.site] = pair if at is None else (pair[0][at], pair[1][at])
    return found


def linearize_(model: nn.Module, lines: Iterable[Line], values: Values | None = None) -> None:
    """Take activations out: the layer in front takes up the line, an identity takes the place.

    Args:
        model: the dense model, or a cut one; written in place.
        lines: a plan's decisions.
        values: slopes and shifts by name; None where only the structure matters.

    Raises:
        StructureError: if a layer cannot take up its line.
    """
    for line in lines:
        if line.into is not None and line.surrogate != "identity":
            old = model.get_submodule(line.into)
            pair = _neutral(old) if values is None else values[line.site]
            _put_(model, line.into, _taken_up(old, *pair, line.surrogate))
        training = model.get_submodule(line.site).training
        _put_(model, line.site, nn.Identity().train(training))


def _neutral(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Write the line that changes nothing, at a layer's width."""
    if isinstance(layer, (nn.Linear, BatchNorm)):
        size = layer.out_features if isinstance(layer, nn.Linear) else layer.num_features
    elif isinstance(layer, TOKEN_NORMS):
        size = layer.normalized_shape[0]
    else:
        size = describe(layer).out
    ones = torch.ones(size, dtype=torch.float64)
    return ones, torch.zeros_like(ones)


def _taken_up(layer: nn.Module, slope: Tensor, shift: Tensor, kind: str) -> nn.Module:
    """Give a layer a bias whenever its line may shift: shapes must not depend on numbers."""
    new = rescaled(layer, slope, shift)
    if kind == "affine" and is_weighted(new) and new.bias is None:
        weight = tensor(new, "weight")
        flag = new.weight.requires_grad
        new.bias = nn.Parameter(weight.new_zeros(len(slope)), requires_grad=flag)
    return new


def _put_(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


def refold_(model: nn.Module, foldings: Sequence[Folding], *, example: Any = None) -> None:
    """Fold again, on an equal model, what was found to fold.

    Args:
        model: with the same activations gone; written in place.
        foldings: a plan's decisions.
        example: one batch to hold exact folds to their word on; None where only the structure
            matters.

    Raises:
        PlanError: if the layers do not fold into the one that the plan names.
        StructureError: if they do not fold at all.
        VerificationError: if exact folds move the output by more than rounding.
    """
    if example is None or not foldings:
        _refold_(model, foldings)
        return
    before = _outputs(model, example)
    _refold_(model, foldings)
    moved, exact = gap(before, _outputs(model, example)), all(f.kind == "exact" for f in foldings)
    if moved == float("inf") or (exact and moved > tolerance(model)):
        raise VerificationError(
            f"folding moves the output by {moved:.1e} of its largest entry.",
            where=", ".join(f.into for f in foldings),
            fix="make the plan anew, on data like this.",
        )


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [t.clone() for t in flat_tensors(run(model, example))]


def _refold_(model: nn.Module, foldings: Iterable[Folding]) -> None:
    for folding in foldings:
        new = replacements(list(_layers(model, folding.layers)))
        found = [path for path, module in new.items() if is_weighted(module)]
        if found != [folding.into]:
            raise PlanError(
                f"the plan folds into '{folding.into}', the layers into {found}.",
                where="Plan.foldings",
                fix="apply the plan to the dense model it was made for; do not edit its folds.",
            )
        training = new[folding.into].training
        new |= {path: nn.Identity().train(training) for path in folding.idle}
        for path, module in new.items():
            _put_(model, path, module)


def _layers(model: nn.Module, paths: Sequence[str]) -> Iterator[Layer]:
    """Describe layers by themselves: what slides over what is told by those with weights."""
    modules = [model.get_submodule(path) for path in paths]
    known = [describe(module) for module in modules if is_weighted(module)]
    channels = known[0].into if known else 0
    for path, module in zip(paths, modules, strict=True):
        if isinstance(module, TOKEN_NORMS):
            yield Layer(path, module, "norm", geometry=diagonal(*norm_line(module), 0).geometry)
            continue
        axes = max((g.axes for g in known), default=0)
        geometry = describe(module, channels=channels, axes=axes)
        channels = geometry.out if not isinstance(module, POOLS) else channels
        yield Layer(path, module, "affine", geometry=geometry)


def changes(model: nn.Module, plan: Plan, example: Any) -> dict[str, int]:
    """Predict what a plan's lines and folds add to each cost, at the size of an example.

    Args:
        model: with activations gone, and not folded yet.
        plan: the decisions.
        example: one batch.

    Returns:
        measure to what is added; negative where folds save.
    """
    total = {"params": sum(line.params for line in plan.lines), "macs": 0}
    if not plan.foldings:
        return total
    found = chains(model, flow(model, example), batch_size(example))
    layers = {x.path: x for chain in found for x in chain}
    for folding in plan.foldings:
        piece = composed([layers[path] for path in folding.layers])
        total["params"] += piece.params.after - piece.params.before
        total["macs"] += piece.macs.after - piece.macs.before
    return total


def refolded(graph: Graph, plan: Plan) -> tuple[Graph, dict[str, tuple[str, Tail]]]:
    """Describe a model whose activations are gone and whose layers are folded, to mend it.

    Args:
        graph: the dense model's analysis.
        plan: the decisions.

    Returns:
        the analysis without the layers that are gone, with tails of those that stand for them;
        and, for every layer that is to write something else than in the dense model, whose
        output there, and what that passes next.
    """
    tails, aims = dict(graph.tails), dict[str, tuple[str, Tail]]()
    inside = {path for f in plan.foldings for path in f.layers}
    for folding in plan.foldings:
        tail = _tail(graph, folding)
        aims[folding.into], tails[folding.into] = (folding.writes, tail), tail
    for line in plan.lines:
        if line.into in graph.order and line.into not in inside:
            aims[line.into], tails[line.into] = (line.site, Tail()), Tail()
    return replace(graph, tails=tails, order=_order(graph, plan)), aims


def _order(graph: Graph, plan: Plan) -> tuple[str, ...]:
    """Put each layer that stands for others where the first of these ran: it may sit at a norm."""
    firsts, inside = dict[str, str](), set[str]()
    for folding in plan.foldings:
        linear = [path for path in graph.order if path in folding.layers]
        firsts |= dict.fromkeys(linear[:1], folding.into)
        inside.update(linear[1:])
    return tuple(firsts.get(path, path) for path in graph.order if path not in inside)


def _tail(graph: Graph, folding: Folding) -> Tail:
    """Find what the output of a fold passes: what its last layer's does, from there on."""
    last = next((p for p in reversed(folding.layers) if p in graph.order), "")
    tail = graph.tails.get(last, Tail())
    way = (last, *tail.modules)
    if folding.writes not in way:  # an activation or a pool
        return Tail()
    rest = tail.modules[way.index(folding.writes) :]
    return Tail(tuple(path for path in rest if path not in folding.idle), tail.added)
