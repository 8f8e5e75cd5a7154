"""Questions to ask before the first write."""

from __future__ import annotations

import torch
from torch import nn

from torch_otprune.errors import PlanError
from torch_otprune.plan.depth import stand_ins
from torch_otprune.plan.model import Plan
from torch_otprune.plan.replacement import Replacement
from torch_otprune.plan.slices import slices
from torch_otprune.policy import Layers, Linearize
from torch_otprune.structure.fingerprint import fingerprint
from torch_otprune.structure.graph import Graph
from torch_otprune.structure.trace import check
from torch_otprune.surgery.cut import check_cuts
from torch_otprune.surgery.exchange import check_drops
from torch_otprune.surgery.thin import check_thinned

__all__ = ["check_plan", "check_slices", "tolerance"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Make sure that a plan belongs to a model.

    Args:
        model: the dense model.
        plan: what is about to be carried out.

    Raises:
        PlanError: if the model's tensors are not those the plan was made for.
        StructureError: if the model cannot be cut at all.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"a {type(plan).__name__} is no plan.",
            where="apply_",
            fix="pass what attached.plan() returned, or call prune_ with a policy.",
        )
    check(model)
    check_cuts(model, plan.cuts)
    check_drops(model, plan.drops)
    _check_lines(model, plan)
    check_thinned(model, plan)
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise PlanError(
            "the plan was made for a model with other tensors.",
            where=f"{type(model).__name__}, fingerprint {found[:12]}; plan {plan.fingerprint[:12]}",
            fix="apply it to the dense model it was made for.",
        )


def _check_counts(plan: Plan) -> None:
    """Hold the decisions to the numbers that the plan records and its rules ask for."""
    gone = plan.layers.before - plan.layers.after
    if gone != len(plan.drops):
        raise _edited(
            f"the plan records {gone} layers that go, but names {len(plan.drops)}", "drops"
        )
    for index, rule in enumerate(plan.policy.rules):
        if not isinstance(rule, (Layers, Linearize)) or not isinstance(rule.drop, int):
            continue
        field, things = (
            ("drops", "layers") if isinstance(rule, Layers) else ("lines", "activations")
        )
        named = plan.drops if isinstance(rule, Layers) else plan.lines
        found = [decision.rule for decision in named].count(index)
        if found != rule.drop:
            raise _edited(
                f"rule {index} of the plan drops {rule.drop} {things}, but the plan names {found}",
                field,
            )
    sites = {line.site for line in plan.lines}
    for folding in plan.foldings:
        if missing := [site for site in folding.lines if site not in sites]:
            raise _edited(
                f"the plan folds past '{missing[0]}', which it does not make linear", "lines"
            )


def _edited(problem: str, field: str) -> PlanError:
    return PlanError(
        f"{problem}.",
        where=f"Plan.{field}",
        fix="apply the plan as attached.plan() made it; to remove something else, change the "
        "policy and plan again.",
    )


def _check_params(graph: Graph, plan: Plan) -> None:
    """Hold the decisions to the size that the plan records."""
    removed = [graph.block(drop.block) for drop in plan.drops]
    instead, widths = stand_ins(plan, graph)["params"], graph.widths(removed)
    cost = graph.costs["params"].gated(removed, instead, widths)
    left = cost.at(graph.full() | plan.keep()) + sum(line.params for line in plan.lines)
    left += sum(folding.params.after - folding.params.before for folding in plan.foldings)
    if left != plan.params.after:
        raise _edited(
            f"the plan records {plan.params.after:,} parameters after, but its decisions leave "
            f"{left:,}",
            "params",
        )


def _check_lines(model: nn.Module, plan: Plan) -> None:
    names = {name for name, _ in model.named_modules()}
    wanted = [path for line in plan.lines for path in (line.site, line.into) if path is not None]
    wanted += [path for folding in plan.foldings for path in (*folding.layers, *folding.idle)]
    for path in wanted:
        if path not in names:
            raise PlanError(
                "the plan makes linear, or folds, a module that the model has not.",
                where=f"'{path}'",
                fix="apply the plan to the dense model it was made for.",
            )


def check_slices(graph: Graph, plan: Plan) -> None:
    """Make sure that every decision still says what it means, and that none is missing.

    Args:
        graph: the dense model's analysis.
        plan: what is about to be carried out.

    Raises:
        PlanError: if a group is not there, a slice or a line was edited, or a decision was taken
            out, so that the plan no longer leaves what it records.

    Limits: a line that costs nothing and folds nothing can be missed if its rule's `drop` is a
        share: the plan records no number of activations.
    """
    groups = {group.name: group for group in graph.groups}
    for cut in plan.cuts:
        group = groups.get(cut.group)
        fits = group is not None and max(cut.keep) < group.units == cut.units
        if (
            group is None
            or not fits
            or slices(group, torch.tensor(cut.keep, device="cpu")) != cut.slices
        ):
            raise PlanError(
                f"the cut of group '{cut.group}' does not fit the model.",
                where="Plan.cuts" if group else f"Plan.cuts; groups: {', '.join(groups)}",
                fix="apply the plan as attached.plan() made it; do not edit its slices.",
            )
    blocks = {block.name: block for block in graph.blocks}
    for drop in plan.drops:
        block, kind = blocks.get(drop.block), plan.policy.rules[drop.rule]
        assert isinstance(kind, Layers)
        assert isinstance(kind.replace, Replacement)
        if block is None or kind.replace.swaps(block) != drop.swaps:
            raise PlanError(
                f"the removal of '{drop.block}' does not fit the model.",
                where="Plan.drops" if block else f"Plan.drops; blocks: {', '.join(blocks)}",
                fix="apply the plan as attached.plan() made it; do not edit its swaps.",
            )

    sites = {site.name: site for site in graph.sites}
    for line in plan.lines:
        site = sites.get(line.site)
        if site is None or site.reason:
            said = "" if site is None else f": {site.reason}"
            raise PlanError(
                f"'{line.site}' cannot become linear{said}.",
                where=f"Plan.lines; activations: {', '.join(sites)}",
                fix="apply the plan as attached.plan() made it; do not edit its lines.",
            )
    _check_counts(plan)
    _check_params(graph, plan)


def tolerance(model: nn.Module) -> float:
    """Tell how far rounding alone may take a cut model from the masked one.

    Args:
        model: the dense model.

    Returns:
        a share of the largest output, by the coarsest floating type among the parameters.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max((_TOLERANCE.get(kind, 1e-3) for kind in kinds), default=1e-3)
