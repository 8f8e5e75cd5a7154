"""Policies declared on classes, and how a model's own is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from torch_otprune.errors import PolicyError
from torch_otprune.policy.model import Budget, Policy, RuleLike
from torch_otprune.policy.rules import Rule
from torch_otprune.policy.targets import Classes, match, module_classes, owner, selects

__all__ = ["policy_of", "prunable"]

_ATTRIBUTE = "__otprune_policy__"

M = TypeVar("M", bound=type[nn.Module])


def prunable(
    *rules: RuleLike, budget: Budget | Mapping[str, Any] | None = None, **fields: Any
) -> Callable[[M], M]:
    """Declare on a module class how its instances are pruned.

    Subclasses inherit the declaration until they make their own. A policy that is passed
    to `attach` wins over it. The class gains one attribute and behaves as before.

    Args:
        *rules: what may go; without any, `Channels()`.
        budget: what the whole model keeps.
        **fields: further fields of `Policy`.

    Returns:
        a decorator that returns the class it is given.

    Raises:
        OTPruneError: `PolicyError` or `BudgetError`, if the declaration is invalid.

    Example:
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> @prunable(budget={"macs": "50%"})
        ... class Net(nn.Sequential): ...
        >>> policy_of(Net()).budget.macs
        Amount(value=0.5)
    """
    if rules:
        _refuse(isinstance(rules[0], type), rules[0])
    policy = Policy(rules=rules or ("channels",), budget=budget, **fields)

    def declare(cls: M) -> M:
        _refuse(not (isinstance(cls, type) and issubclass(cls, nn.Module)), cls)
        setattr(cls, _ATTRIBUTE, policy)
        return cls

    return declare


def policy_of(model: nn.Module) -> Policy | None:
    """Find what the classes of a model declare.

    The declaration of the model's own class speaks for the whole tree. Without one, the
    outermost declaring submodules are put together: each rule is aimed at exactly the
    modules that it owns inside its submodule. Their budget, which they must share, is then
    the budget of the whole model, not of the submodule alone.

    Args:
        model: any module; it is read, not changed.

    Returns:
        one policy, or None if no class declares any.

    Raises:
        PolicyError: if two classes declare different budgets, calibrations or seeds, or a
            target matches nothing in its submodule.
    """
    found = _declared(type(model))
    if found is not None:
        return found[1]
    parts = _outermost(model)
    if not parts:
        return None
    _agree(parts)
    first = parts[0].policy
    return Policy(
        rules=_gathered(parts),
        budget=first.budget,
        calibration=first.calibration,
        seed=first.seed,
    )


class _Part(NamedTuple):
    """A submodule and the class that declared its policy."""

    path: str
    classes: Classes
    cls: type
    policy: Policy


def _refuse(misused: bool, subject: object) -> None:
    """Refuse what cannot be decorated."""
    if misused:
        raise PolicyError(
            f"prunable cannot decorate {subject!r}.",
            where="@prunable",
            fix="write @prunable(...), with the parentheses, above a subclass of nn.Module.",
        )


def _declared(cls: type) -> tuple[type, Policy] | None:
    """Find the nearest class in the MRO that declares."""
    for base in cls.__mro__:
        policy = vars(base).get(_ATTRIBUTE)
        if isinstance(policy, Policy):
            return base, policy
    return None


def _outermost(model: nn.Module) -> list[_Part]:
    """List the topmost declaring submodules, in order of registration."""
    parts: list[_Part] = []
    everything = module_classes(model)
    for path, module in model.named_modules():
        # named_modules goes depth first: what is below a module follows it directly
        inside = bool(parts) and path.startswith(f"{parts[-1].path}.")
        if not inside and (found := _declared(type(module))):
            parts.append(_Part(path, _below(path, everything), *found))
    return parts


def _below(path: str, classes: Classes) -> Classes:
    """Cut a container out, itself as the root."""
    inside = {p: names for p, names in classes.items() if p == path or p.startswith(f"{path}.")}
    return {p[len(path) + 1 :]: names for p, names in inside.items()}


def _agree(parts: list[_Part]) -> None:
    """Refuse declarations that say different things about the whole model."""
    first = parts[0]
    for part in parts[1:]:
        for field in ("budget", "calibration", "seed"):
            ours, theirs = getattr(first.policy, field), getattr(part.policy, field)
            if ours != theirs:
                raise PolicyError(
                    f"{first.cls.__name__} and {part.cls.__name__} declare different {field}s: "
                    f"{ours!r} and {theirs!r}.",
                    where=f"classes of {first.path!r} and {part.path!r}",
                    fix=f"declare the {field} on the model's own class, or pass a policy.",
                )


def _gathered(parts: list[_Part]) -> list[Rule]:
    """Aim every rule at what it owns, instances of one class together."""
    aims: dict[tuple[type, int], tuple[Rule, list[str], list[str]]] = {}
    for part in parts:
        for index, rule in enumerate(part.policy.rules):
            targets, ignore = _aim(part, index)
            _, all_targets, all_ignore = aims.setdefault((part.cls, index), (rule, [], []))
            all_targets += targets
            all_ignore += ignore
    return [
        rule.model_copy(update={"targets": tuple(targets), "ignore": tuple(ignore)})
        for rule, targets, ignore in aims.values()
        if targets
    ]


def _aim(part: _Part, index: int) -> tuple[list[str], list[str]]:
    """Spell what one rule of a submodule owns and ignores as paths of the whole model."""
    policy, classes = part.policy, part.classes
    rule = policy.rules[index]
    where = f"{part.cls.__name__}, Policy.rules[{index}]"
    ignore = (*rule.ignore, *policy.ignore)
    match(rule.targets, ignore, classes, where=where)
    rivals = [other for other in policy.rules if other.kind == rule.kind]
    owned = [p for p in classes if _owns(rivals, rule, p, classes, policy.ignore)]
    spared = [p for p in classes if selects(ignore, p, classes)]
    return _tops(owned, part.path), _tops(spared, part.path)


def _owns(
    rivals: list[Rule], rule: Rule, path: str, classes: Classes, ignore: tuple[str, ...]
) -> bool:
    index = owner(rivals, path, classes, ignore=ignore)
    return index is not None and rivals[index] is rule


def _tops(paths: list[str], prefix: str) -> list[str]:
    """Write only the first path of each chain: it stands for all below it."""
    chosen = set(paths)
    tops = [p for p in paths if not p or p.rpartition(".")[0] not in chosen]
    return [f"{prefix}.{p}".rstrip(".") for p in tops if not ("" in chosen and p)]
