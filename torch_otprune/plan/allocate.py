"""Choose how many units every group keeps: least predicted error within the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor
from types import MappingProxyType
from typing import Literal

import numpy as np

from torch_otprune.errors import BudgetError, PlanError
from torch_otprune.plan.choice import Choice
from torch_otprune.plan.knapsack import Floats, Measure, Problem, State, split
from torch_otprune.plan.search import solve
from torch_otprune.plan.ties import tie, untie
from torch_otprune.structure.graph import CostModel, Dim

__all__ = ["Allocation", "Choice", "allocate"]

LANDING = 0.99  # a budget used less than this is explained
LARGEST = 1 << 62  # costs are 64-bit integers
_ROOT = "the model's own forward"  # products that no layer inside of it runs
_NONE: frozenset[str] = frozenset()
_ALONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Allocation:
    """How many units every group keeps.

    Args:
        keep: kept units of every group.
        solver: `milp` or `greedy`.
        notes: what the user should know, one sentence each.
    """

    keep: dict[str, int]
    solver: str
    notes: tuple[str, ...]


def allocate(
    choices: Sequence[Choice],
    *,
    costs: Mapping[str, CostModel],
    limits: Mapping[str, int],
    kind: Mapping[str, str] = _ALONE,
    solver: Literal["auto", "milp", "greedy"] = "auto",
) -> Allocation:
    """Choose one width per group so that the summed loss is least and every cost in its limit.

    Args:
        choices: one per group, in any order: the order changes nothing.
        costs: exact costs by measure; every group they name must have a choice.
        limits: the most each measure may cost, in its own unit; none at all keeps everything.
        kind: group to the group whose width it takes; the others choose for themselves.
        solver: `milp` solves mixed-integer programs and improves on the greedy choice,
            `greedy` does without, `auto` solves programs up to 150 groups.

    Returns:
        the widths; no group can be widened by itself without breaking a limit.

    Raises:
        BudgetError: if the narrowest widths exceed a limit, or groups of a kind have no width
            in common.
        PlanError: if a curve, the widths, a name or a measure is wrong.

    Source: the multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, chapter 11);
    the products of two widths, as moves around the best choice so far, are ours.

    Limits: exact to 1e-9 up to 400 widths in all and 1000 columns with products (one per
    width of the smaller group of each pair), unless HiGHS runs out of its 500 nodes. Beyond
    that each program is within 1e-4 of what the widths it sees allow, with no proof for the
    whole, and a looser budget may then lose more by as much. `greedy` promises neither.
    Costs must not fall where a width grows.
    """
    dense = _check(choices, costs, limits)
    names = [choice.name for choice in choices]
    if kind:
        choices, costs = tie(choices, costs, kind)
    problem, blocks = _problem(choices, costs, limits), _blocks(costs)
    _reachable(problem, costs, dense, blocks)
    whole = problem.fits(problem.most)
    state, by = (problem.most, "greedy") if whole else solve(problem, solver)
    keep = dict(zip(problem.names, problem.kept(state), strict=True))
    return Allocation(untie(keep, kind, names), by, _notes(problem, state, blocks))


def _blocks(costs: Mapping[str, CostModel]) -> frozenset[str]:
    """List the choices that are whole layers, which go or stay."""
    return frozenset(term.owner for term in costs["layers"].terms) if "layers" in costs else _NONE


def _problem(
    choices: Sequence[Choice], costs: Mapping[str, CostModel], limits: Mapping[str, int]
) -> Problem:
    ordered = sorted(choices, key=lambda choice: choice.name)
    names = tuple(choice.name for choice in ordered)
    widths = tuple(np.array(choice.widths, dtype=np.int64) for choice in ordered)
    losses = tuple(_curve(c)[w] for c, w in zip(ordered, widths, strict=True))
    measures = tuple(Measure.expand(costs[m], int(limits[m]), names) for m in sorted(limits))
    return Problem(names, widths, losses, measures)


def _curve(choice: Choice) -> Floats:
    """Take the running minimum: more units never lose more than fewer."""
    curve = choice.curve.detach().double().cpu().numpy()
    lowest: Floats = np.minimum.accumulate(curve)
    return lowest


def _check(
    choices: Sequence[Choice], costs: Mapping[str, CostModel], limits: Mapping[str, int]
) -> dict[str, int]:
    """Read everything once before the search; the dense widths come out."""
    counted = Counter(choice.name for choice in choices)
    for choice in choices:
        _check_choice(choice, counted[choice.name])
    for measure in limits:
        if measure not in costs:
            raise PlanError(
                f"{measure!r} is limited but has no cost model.",
                where=f"limits; known measures: {', '.join(sorted(costs)) or 'none'}",
                fix="limit one of the known measures.",
            )
    dense = {choice.name: len(choice.curve) - 1 for choice in choices}
    for measure in limits:
        _check_cost(costs[measure], dense)
    return dense


def _check_choice(choice: Choice, times: int) -> None:
    widths, shape = choice.widths, tuple(choice.curve.shape)
    problem = None
    if times > 1:
        problem = f"group {choice.name!r} has {times} choices."
    elif len(shape) != 1 or shape[0] < 2:
        problem = f"the curve of group {choice.name!r} has shape {shape}, not (units + 1,)."
    elif not widths:
        problem = f"group {choice.name!r} has no allowed width."
    elif any(a >= b for a, b in pairwise(widths)) or not 0 <= widths[0] <= widths[-1] < shape[0]:
        problem = (
            f"the widths of group {choice.name!r} do not ascend within 0 to {shape[0] - 1}: "
            f"{', '.join(map(str, widths[:8]))}{', ...' if len(widths) > 8 else ''}."
        )
    elif bool(choice.curve.isnan().any()) or not np.isfinite(_curve(choice)[list(widths)]).all():
        problem = f"the curve of group {choice.name!r} is not finite."
    if problem is not None:
        raise PlanError(
            problem,
            where=f"allocate, group {choice.name}",
            fix="give one finite curve[k] for k = 0 to all units, and ascending widths.",
        )


def _check_cost(model: CostModel, dense: Mapping[str, int]) -> None:
    named = {name for term in model.terms for dim in term.dims for name, _ in dim.by_group}
    unknown = sorted(named - dense.keys())
    if unknown:
        raise PlanError(
            f"{model.measure} depends on group {unknown[0]!r}, which has no choice.",
            where=f"costs[{model.measure!r}]; groups without a choice: {', '.join(unknown[:5])}",
            fix="give every group a choice; one with a single width keeps that width.",
        )
    if model.at(dense) * split(model) >= LARGEST:
        raise PlanError(
            f"{model.measure} of the dense model is {model.at(dense):,}, beyond 64-bit integers.",
            where=f"costs[{model.measure!r}]",
            fix="use a smaller example input.",
        )


def _reachable(
    problem: Problem,
    costs: Mapping[str, CostModel],
    dense: Mapping[str, int],
    blocks: frozenset[str],
) -> None:
    """Refuse a limit below what the narrowest widths cost."""
    keep = dict(zip(problem.names, problem.kept(problem.least), strict=True))
    for measure in problem.measures:
        model = costs[measure.name]
        least, whole, limit = model.at(keep), model.at(dense), measure.limit // measure.parts
        if least <= limit:
            continue
        percent = ceil(1000 * least / max(whole, 1)) / 10
        held = f"most of the least is {'; '.join(_blockers(model, keep, blocks))}"
        held = _fixed(model, keep, dense) + held
        if measure.name == "layers":
            held = f"kept by rules of their own: {', '.join(sorted(b for b in blocks if keep[b]))}"
        ways = _ways(problem, measure.name, dense, blocks)
        raise BudgetError(
            f"a budget of {limit:,} {measure.name} ({limit / max(whole, 1):.1%}) "
            f"cannot be reached: the least is {least:,} ({percent:.1f}%).",
            where=f"Budget.{measure.name}; {held}",
            fix=f"keep at least {percent:.1f}% of {measure.name}; or {ways}.",
        )


def _fixed(model: CostModel, keep: Mapping[str, int], dense: Mapping[str, int]) -> str:
    """Say how much of a cost no rule reaches, and how much of that attention multiplies."""
    still = [t for t in model.terms if not any(_narrows(d, keep, dense) for d in t.dims)]
    share, data = (
        float(sum(t.at(dense) for t in some) / max(model.at(dense), 1))
        for some in (still, [t for t in still if t.data])
    )
    tokens = f" ({data:.1%} where data meets data, as in attention)" if data else ""
    return f"no rule reaches {share:.1%} of all {model.measure}{tokens}; " if share else ""


def _narrows(dim: Dim, keep: Mapping[str, int], dense: Mapping[str, int]) -> bool:
    return any(keep[name] < dense[name] for name, _ in dim.by_group)


def _ways(problem: Problem, measure: str, dense: Mapping[str, int], blocks: frozenset[str]) -> str:
    """Say what else would reach a budget, in the words of the rules that are there."""
    choices = list(zip(problem.names, problem.widths, strict=True))
    ways = []
    if any(name in blocks and list(widths) == [1] for name, widths in choices):
        ways += ["raise drop, or lower keep, of the rules about layers"]
    if measure != "layers" and blocks:
        ways += ["target more layers"]
    narrows = any(name not in blocks and widths[0] < dense[name] for name, widths in choices)
    if measure != "layers" and (narrows or not blocks):
        ways += ["lower min_keep, multiple_of or keep of the rules", "target more groups"]
    return ", or ".join(ways)


def _blockers(model: CostModel, keep: Mapping[str, int], blocks: frozenset[str]) -> list[str]:
    """Name the three layers that cost most at the narrowest widths, and what holds them."""
    price: Counter[str] = Counter()
    groups: dict[str, set[str]] = {}
    for term in model.terms:
        price[term.owner] += floor(term.at(keep))
        named = {name for dim in term.dims for name, _ in dim.by_group}
        groups.setdefault(term.owner, set()).update(named)
    priced = (owner for owner in price if price[owner])
    worst = sorted(priced, key=lambda owner: (-price[owner], owner))[:3]
    held = (_held(sorted(groups[owner]), keep, blocks) for owner in worst)
    return [
        f"{owner or _ROOT} {price[owner]:,} ({why})" for owner, why in zip(worst, held, strict=True)
    ]


def _held(groups: Sequence[str], keep: Mapping[str, int], blocks: frozenset[str]) -> str:
    """Say why a layer costs no less: its width, or the block that it is part of."""
    stays = [f"layer '{name}' stays" for name in groups if name in blocks and keep[name]]
    widths = [f"{name}: {keep[name]}" for name in groups if name not in blocks]
    held = [f"at the least width of {', '.join(widths)}"] if widths else []
    return ", ".join([*stays, *held]) or "fixed"


def _notes(problem: Problem, state: State, blocks: frozenset[str]) -> tuple[str, ...]:
    """Say why the budget is not used up, where it is not."""
    slack = problem.slack(state)
    used = [1 - s / max(m.limit, 1) for s, m in zip(slack, problem.measures, strict=True)]
    if not used or max(used) >= LANDING:
        return ()
    whole = state == problem.most
    m, group, cost = (int(np.argmax(used)), 0, 0) if whole else _least_step(problem, state)
    name, left, limit = problem.measures[m].name, slack[m], problem.measures[m].limit
    parts = problem.measures[m].parts
    share = f"{left // parts:,} {name} ({left / limit:.1%} of the budget)"
    if whole:
        return (f"The widest allowed widths leave {share} unused.",)
    kept, wider = (int(problem.widths[group][state[group] + up]) for up in (0, 1))
    step = f"group {problem.names[group]} from {kept} to {wider} units"
    if problem.names[group] in blocks:
        step = f"keeping the layer '{problem.names[group]}'"
    costs = f"{cost // parts:,}"
    return (f"{share} stay unused, because the smallest step left, {step}, costs {costs}.",)


def _least_step(problem: Problem, state: State) -> tuple[int, int, int]:
    """Find the step that misses the budget by least: measure it breaks, group, cost."""
    position = problem.at(state)
    misses = []
    for group in (g for g, top in enumerate(problem.most) if state[g] < top):
        step = position.deltas(group)[:, state[group] + 1].tolist()
        rows = zip(step, position.slack, problem.measures, strict=True)
        over = [(cost - slack) / max(measure.limit, 1) for cost, slack, measure in rows]
        worst = int(np.argmax(over))
        misses.append((over[worst], worst, group, int(step[worst])))
    return min(misses)[1:]
