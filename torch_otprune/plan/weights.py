"""Which layers a rule about weights reaches, and how many weights stay in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NoReturn

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from torch_otprune.criteria.weights.base import WeightCriterion
from torch_otprune.errors import PolicyError, StructureError
from torch_otprune.plan.model import Refusal, Thinning
from torch_otprune.policy import Layers, Linearize, Policy, Weights, match, module_classes, owner
from torch_otprune.statistics.patches import supported
from torch_otprune.structure.graph import Graph
from torch_otprune.structure.layers import Conv, is_dense, is_depthwise, lies_across, shared, tensor

__all__ = ["check_weights", "shape_of", "thinning_quote", "thinnings", "weight_rules"]

# float64 numbers per pair of inputs and per weight, of a choice and of a fit: measured as the peak
# of the process, on dense layers of 800 and 1500 inputs
_CHOICE, _FIT = (6, 4), (15, 32)

_MAGNITUDE = "choose criterion='magnitude', which needs no data, or ignore the layer."


def weight_rules(policy: Policy) -> dict[int, Weights]:
    """List the policy's rules about weights by their index."""
    return {i: rule for i, rule in enumerate(policy.rules) if isinstance(rule, Weights)}


def check_weights(policy: Policy) -> None:
    """Refuse rules about weights that could never become a plan, before any data is seen.

    Args:
        policy: the declaration.

    Raises:
        PolicyError: if it asks for rounds, or for layers to go as well, or limits by a budget what
            zeros cannot change.
    """
    found = weight_rules(policy)
    if not found:
        return
    where = f"Policy.rules[{min(found)}]"
    if policy.schedule is not None:
        raise PolicyError(
            "a schedule prunes in rounds, and weights go at once.",
            where=f"Policy.schedule, {where}",
            fix="prune weights by a policy of their own, behind the last round.",
        )
    if any(isinstance(rule, (Layers, Linearize)) for rule in policy.rules):
        raise PolicyError(
            "rules about weights and about layers do not go together.",
            where=where,
            fix="remove layers first, then prune weights by a policy of their own.",
        )
    if policy.budget is not None and len(found) == len(policy.rules):
        raise PolicyError(
            f"a zero is a parameter and costs its MAC: no rule can meet the budget for "
            f"{', '.join(policy.budget.limits)}.",
            where=f"Policy.budget, {where}",
            fix="drop the budget; `keep` or `pattern` says how many weights stay.",
        )


def shape_of(module: nn.Module) -> tuple[int, int, int, int]:
    """Read a layer's weight as matrices.

    Args:
        module: dense layer or convolution.

    Returns:
        groups, outputs per group, input channels per group, taps of one.
    """
    weight = tensor(module, "weight")
    if lies_across(module):
        return 1, weight.shape[1], weight.shape[0], 1
    groups = module.groups if isinstance(module, Conv) else 1
    return groups, weight.shape[0] // groups, weight.shape[1], weight[0, 0].numel()


def thinning_quote(model: nn.Module, policy: Policy, graph: Graph) -> dict[str, int]:
    """Tell how much memory choosing weights by data takes, before the first batch.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        bytes at the layer that takes most, by its path: layers are taken one by one. Empty where
        no rule about weights looks at data.

    Limits: the rows that `net_trim` keeps besides depend on the data, and are not counted.
    """
    rules, found = list(weight_rules(policy).values()), dict[str, int]()
    if not rules:
        return found
    classes, ties = module_classes(model), shared(model)
    for path, module in model.named_modules():
        by = owner(rules, path, classes, ignore=policy.ignore) if supported(module) else None
        if by is None or _objection(path, module, rules[by], graph, ties=ties):
            continue
        criterion = rules[by].criterion
        assert isinstance(criterion, WeightCriterion)
        if criterion.needs:
            groups, out, width, taps = shape_of(module)
            pairs, each = _FIT if criterion.refits else _CHOICE
            columns = width * taps + 1
            found[path] = 8 * groups * columns * (pairs * columns + each * out)
    return dict(sorted(found.items(), key=lambda item: item[1])[-1:])


def thinnings(
    model: nn.Module, policy: Policy, graph: Graph
) -> tuple[list[Thinning], list[Refusal]]:
    """Decide how many weights stay in every layer.

    Args:
        model: cut as the plan says; read, never written.
        policy: the declaration.
        graph: the dense model's analysis.

    Returns:
        layers in order of execution, and those that are reached and refused.

    Raises:
        StructureError: if a rule reaches no layer, or names one that cannot be pruned.
        TargetError: if a target matches nothing, or two rules fit equally closely.
    """
    rules, classes = weight_rules(policy), module_classes(model)
    for index, rule in rules.items():
        match(rule.targets, rule.ignore, classes, where=f"Policy.rules[{index}]")
    ties, made = shared(model), dict[str, Thinning]()
    refused: dict[int, list[Refusal]] = {index: [] for index in rules}
    for path, module in model.named_modules():
        if not (is_dense(module) or isinstance(module, Conv)):
            continue  # before rules are compared: a tie is to name a layer
        by = owner(list(rules.values()), path, classes, ignore=policy.ignore)
        if by is None:
            continue
        index = list(rules)[by]
        why = _objection(path, module, rules[index], graph, ties=ties)
        if why is not None:
            refused[index].append(Refusal(group=path, reason=why[0], fix=why[1]))
        else:
            made[path] = _thinning(path, module, index, rules[index])
    for index, rule in rules.items():
        _check(index, rule, made, refused[index])
    order = [p for p in graph.order if p in made]
    order += [p for p in made if p not in order]
    asked = [made[p] for p in order if made[p].keep != made[p].weights]
    return asked, [refusal for found in refused.values() for refusal in found]


def _check(
    index: int, rule: Weights, made: Mapping[str, Thinning], refused: Sequence[Refusal]
) -> None:
    named = [r for r in refused if r.group in rule.targets]
    if named:
        _cannot(f"the weights of '{named[0].group}' cannot go", index, rule, named)
    if not any(thinning.rule == index for thinning in made.values()):
        _cannot(f"rule {index} reaches no weights that can go", index, rule, refused)


def _cannot(what: str, index: int, rule: Weights, refused: Sequence[Refusal]) -> NoReturn:
    said = "; ".join(f"{r.group}: {r.reason}" for r in refused[:3])
    raise StructureError(
        f"{what} ({said or 'no linear layer or convolution among the targets'}).",
        where=f"Policy.rules[{index}].targets = {', '.join(rule.targets)}",
        fix=refused[0].fix if refused else "target linear layers or convolutions.",
    )


def _objection(
    path: str, module: nn.Module, rule: Weights, graph: Graph, *, ties: frozenset[str]
) -> tuple[str, str] | None:
    """Say why a layer's weights cannot go, and what would change that."""
    if is_parametrized(module, "weight"):
        return (
            "a parametrisation computes its weight, and would fill the zeros again",
            "bake it in by torch.nn.utils.parametrize.remove_parametrizations first.",
        )
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is no parameter", "prune before quantising or packing the weights."
    if not tensor(module, "weight").is_floating_point():
        return "its weight is quantised", "prune first, then quantise."
    if path in ties:
        return (
            "it shares its weight with another layer, which would get the zeros as well",
            "untie the weights, or ignore the layer.",
        )
    if getattr(module, "transposed", False):
        return "a transposed convolution is not unfolded", "ignore the layer."
    pattern, (_, _, width, _) = rule.neighbours, shape_of(module)
    if width % pattern.m:
        return (
            f"it has {width} input channels per group, which is no multiple of {pattern.m}",
            f"ignore the layer, or choose another pattern than {rule.pattern}.",
        )
    return _unseen(path, module, rule, graph)


def _unseen(path: str, module: nn.Module, rule: Weights, graph: Graph) -> tuple[str, str] | None:
    """Say why a criterion that looks at data cannot look at a layer."""
    criterion = rule.criterion
    assert isinstance(criterion, WeightCriterion)
    if not criterion.needs:
        return None
    if path in graph.repeated:
        return "it runs more than once per forward pass", _MAGNITUDE
    if path not in graph.tails or not supported(module):
        if is_depthwise(module):
            return "a depthwise convolution has one input for every output", _MAGNITUDE
        return f"what a {type(module).__name__} reads here is not followed", _MAGNITUDE
    routed = [m.path for g in graph.groups if g.kind == "experts" for m in g.members]
    routed += [p for b in graph.blocked if b.kind == "experts" for p in b.modules]
    if any(path.startswith(f"{experts}.") for experts in routed):
        return "its router may send it other inputs than it did", _MAGNITUDE
    return None


def _thinning(path: str, module: nn.Module, index: int, rule: Weights) -> Thinning:
    groups, out, width, taps = shape_of(module)
    rows, columns = groups * out, width * taps
    criterion = rule.criterion
    assert isinstance(criterion, WeightCriterion)
    keep: int | None = None
    if not rule.neighbours.free:
        keep = rows * columns * rule.neighbours.n // rule.neighbours.m
    elif rule.keep is not None:
        single = criterion.by_row
        share = Decimal(repr(float(rule.keep.value)))
        keep = max(int(share * columns), 1) * rows if single else int(share * rows * columns)
        keep = max(keep, 1)
    said = f"{criterion.kind} decides within its radius"
    if keep is not None:
        said = f"{criterion.kind}, {rule.pattern}: {keep:,} of {rows * columns:,} stay"
    return Thinning(
        layer=path,
        rule=index,
        criterion=criterion.kind,
        pattern=rule.pattern,
        weights=rows * columns,
        keep=keep,
        reason=said,
    )
