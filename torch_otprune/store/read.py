"""Load what `save` wrote, or say why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from torch_otprune.errors import LoadError, OTPruneError
from torch_otprune.plan.model import Plan
from torch_otprune.store.atomic import rescued
from torch_otprune.store.carry import carry_, places, replace_
from torch_otprune.store.files import PLAN, Saved, opened
from torch_otprune.store.fill import Places, chains_of, fill_, finish_, fit_chains_
from torch_otprune.store.parts import (
    Parts,
    describe,
    difference,
    differences,
    put_back_,
    without,
)
from torch_otprune.store.plans import remember
from torch_otprune.store.shards import check_shards, tensors_of
from torch_otprune.structure.fingerprint import fingerprint, layout

__all__ = ["build", "check_parts", "first_difference", "load", "placed", "shapes"]

_REPLACED = 20  # times that other processes may put a new save in place while this one reads

_NAMED = 3  # differences that a warning spells out


def load(
    directory: str | Path,
    *,
    factory: Callable[[], nn.Module],
    device: str | torch.device | None = None,
    strict: bool = True,
) -> nn.Module:
    """Rebuild a pruned model: the factory's dense model, cut by the plan, with the saved tensors.

    The factory's values are let go before the saved ones are read, a tensor at a time: memory
    holds the dense model or the pruned one, whichever is larger. A factory that builds on the
    meta device (`with torch.device("meta")`) costs nothing.

    Args:
        directory: what `save` wrote.
        factory: builds the dense model with its original shapes; its weights do not matter. For
            a model pruned twice, let it load the first result.
        device: where all tensors go; None for where the factory puts them, and for the CPU if
            that is the meta device.
        strict: whether classes and plain attributes of the factory's model must be those of the
            one that was pruned; if not, only tensors are compared, attributes are set to what
            the saved model says, and a warning names the classes and functions that differ.

    Returns:
        a new module in the saved types, ties, plain attributes and training flags.

    Raises:
        LoadError: if the directory is incomplete, damaged or not ours, or the factory builds
            another model than the one that was pruned. No pickle is ever opened.
    """
    root, home = rescued(Path(directory)), placed(device, where="load(device=)")
    for _ in range(_REPLACED):
        page = _page(root)
        try:
            return _load(root, factory, home, strict=strict)
        except LoadError:
            if _page(root) == page:
                raise
    return _load(root, factory, home, strict=strict)


def _page(root: Path) -> bytes | None:
    try:
        return (root / PLAN).read_bytes()
    except OSError:
        return None


def _load(
    root: Path, factory: Callable[[], nn.Module], device: torch.device | None, *, strict: bool
) -> nn.Module:
    saved = opened(root, Saved)
    headers = check_shards(root, saved)
    with torch.inference_mode(mode=False):  # its tensors could never be trained again
        model = build(factory, where="load")
        _check_dense(model, saved, factory, strict=strict)
        home = _emptied_(model, saved)
        chains = chains_of(model)
        carry_(model, saved.plan)
        fit_chains_(model, saved, chains)
        _check_pruned(model, saved)
        tensors = tensors_of(root, saved, headers)
        fill_(model, Places(model, device, home), saved, tensors)
        finish_(model, saved)
        _say_again_(model, saved, strict=strict)
    remember(model, saved.plan, saved.dense, parts=saved.dense_parts)
    return model


def placed(device: str | torch.device | None, *, where: str) -> torch.device | None:
    """Make sure that tensors can go to a device.

    Args:
        device: as a user writes it.
        where: what to name in an error.

    Returns:
        the device; None for None.

    Raises:
        LoadError: if there is no such device here, or it holds no values.
    """
    if device is None:
        return None
    try:
        found = torch.empty(0, device=device).device
        reason = "holds no values" if found.type == "meta" else ""
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = f"cannot be used: {str(error).splitlines()[0].rstrip('.')}"
    if reason:
        raise LoadError(
            f"the device {str(device)!r} {reason}.",
            where=where,
            fix="name a device of this machine, such as 'cpu' or 'cuda'.",
        )
    return found


def _emptied_(model: nn.Module, saved: Saved) -> torch.device:
    """Let go of the factory's values where no step needs them; tell where they were."""
    homes = {tensor.device for _, _, tensor in places(model) if not tensor.is_meta}
    if len(homes) == 1 and saved.parts is not None:
        replace_(model, lambda t: t if t.is_meta else torch.empty_like(t, device="meta"))
    return homes.pop() if len(homes) == 1 else torch.device("cpu")


def _called(factory: Callable[[], nn.Module], where: str) -> object:
    if not callable(factory):
        return None
    try:
        return factory()
    except OTPruneError:  # it says by itself what is wrong
        raise
    except Exception as error:  # the user's code may raise anything
        raise LoadError(
            f"calling the factory failed: {type(error).__name__}: {error}",
            where=f"{where}, factory {getattr(factory, '__name__', factory)}",
            fix="pass a callable without arguments, such as `lambda: Net(width=64)`.",
        ) from error


def build(factory: Callable[[], nn.Module], *, where: str) -> nn.Module:
    """Call a factory.

    Args:
        factory: builds a model.
        where: what to name in an error.

    Returns:
        the model.

    Raises:
        LoadError: if it fails, or builds no module.
    """
    model = _called(factory, where) if not isinstance(factory, nn.Module) else None
    if not isinstance(model, nn.Module):
        raise LoadError(
            f"the factory is a {type(factory).__name__} that builds no module when called.",
            where=f"{where}, factory",
            fix="pass a callable that builds the dense model, such as the model's class.",
        )
    return model


def _check_dense(
    model: nn.Module, saved: Saved, factory: Callable[[], nn.Module], *, strict: bool
) -> None:
    where = f"load, factory of {type(model).__name__}"
    if fingerprint(model) != saved.plan.fingerprint:
        known = first_difference(layout(model), saved.dense) if saved.dense else None
        raise LoadError(
            known
            or _missing(model, saved.plan)
            or "the factory's model has other tensors than the one that was pruned.",
            where=where,
            fix="pass a factory that builds the dense model exactly as it was when pruned.",
        )
    if strict and saved.dense_parts is not None:
        check_parts(model, saved.dense_parts, factory, where=where)


def check_parts(
    model: nn.Module,
    parts: Parts,
    factory: Callable[[], nn.Module],
    *,
    where: str,
    strict: bool = False,
) -> None:
    """Compare classes and plain attributes with those of the model that was pruned.

    Args:
        model: what the factory built.
        parts: of the dense model that was pruned.
        factory: built again in doubt: what two builds do not agree on says nothing.
        where: what to name in an error.
        strict: whether the caller has no `strict=False` that an error could speak of.

    Raises:
        LoadError: naming the first module and attribute that differ.
    """
    found = describe(model)
    if difference(found, parts) is None:
        return
    found = without(found, describe(build(factory, where=where)))
    if (apart := difference(found, parts)) is not None:
        curable = ", or strict=False to let what the saved model says prevail"
        stays = "; strict=False would keep what this one builds"
        raise LoadError(
            apart.told("the factory's model", "the saved one"),
            where=where,
            fix="pass the factory that built the pruned model"
            f"{'' if strict else curable if apart.curable else stays}.",
        )


def _missing(model: nn.Module, plan: Plan) -> str | None:
    """Name the first module that the plan decides about and that is not there."""
    names = {name for name, _ in model.named_modules()}
    parameters = {name for name, _ in model.named_parameters()}
    wanted = [piece.path for cut in plan.cuts for piece in cut.slices]
    wanted += [swap.path for drop in plan.drops for swap in drop.swaps]
    wanted += [path for line in plan.lines for path in (line.site, line.into) if path is not None]
    wanted += [path for folding in plan.foldings for path in folding.layers]
    found = next((path for path in wanted if path not in names | parameters), None)
    return None if found is None else f"the factory's model has no module '{found}'."


def _check_pruned(model: nn.Module, saved: Saved) -> None:
    """Compare shapes after the cut; types may have been changed since and are restored."""
    if difference := first_difference(shapes(layout(model)), shapes(saved.tensors)):
        raise LoadError(
            difference,
            where=f"load, {type(model).__name__} after its cut",
            fix="save again with the plan that pruned the model last.",
        )


def shapes(described: Mapping[str, str]) -> dict[str, str]:
    """Leave the types out of a layout."""
    return {name: description.partition(":")[0] for name, description in described.items()}


def first_difference(
    here: Mapping[str, str], there: Mapping[str, str], *, of: str = "the factory's model"
) -> str | None:
    """Name the first tensor in which two layouts differ.

    Args:
        here: one layout.
        there: the saved one.
        of: what the one is called.

    Returns:
        a sentence; None where they are equal.
    """
    for name in sorted(here.keys() | there.keys()):
        if name not in there:
            return f"{of} has '{name}', the saved one has not."
        if name not in here:
            return f"{of} has no '{name}', the saved one has."
        if here[name] != there[name]:
            return f"'{name}' is {here[name]} in {of}, {there[name]} in the saved."
    return None


def _say_again_(model: nn.Module, saved: Saved, *, strict: bool) -> None:
    """Put plain attributes back that were changed after the pruning."""
    if saved.parts is None:
        return
    put_back_(model, saved.parts)
    apart = list(differences(describe(model), saved.parts))
    told = [one.told("the loaded model", "the saved one") for one in apart[:_NAMED]]
    if strict and apart:
        raise LoadError(
            told[0],
            where=f"load, {type(model).__name__} after its cut",
            fix="make the same change in the factory, or pass strict=False to go without it.",
        )
    if apart:
        more = f" There are {len(apart) - _NAMED} more." if len(apart) > _NAMED else ""
        warnings.warn(
            f"what the factory builds stays, for a class or a function cannot be put back: "
            f"{' '.join(told)}{more} Change the factory if the answers must be those of the saved "
            "model.",
            stacklevel=4,
        )
