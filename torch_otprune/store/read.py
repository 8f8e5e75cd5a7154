"""Load what `save` wrote, or say why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_otprune.errors import LoadError, OTPruneError
from torch_otprune.fold import linearize_, refold_
from torch_otprune.plan.model import Plan
from torch_otprune.store.files import PLAN, WEIGHTS, Saved, digest, format_of, transient
from torch_otprune.store.plans import remember
from torch_otprune.structure.fingerprint import fingerprint, layout
from torch_otprune.surgery import cut_, exchange_, take_out_

__all__ = ["load"]


def load(directory: str | Path, *, factory: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a pruned model: the factory's dense model, cut by the plan, with the saved tensors.

    Args:
        directory: what `save` wrote.
        factory: builds the dense model with its original shapes; its weights do not matter. For
            a model pruned twice, let it load the first result.

    Returns:
        a new module on the factory's device, in the saved types, ties and training flags.

    Raises:
        LoadError: if the directory is incomplete, damaged or not ours, or the factory builds
            another model than the one that was pruned.
    """
    root = Path(directory)
    saved = _read(root)
    tensors = _read_weights(root, saved)
    model = _build(factory)
    _check_dense(model, saved)
    cut_(model, saved.plan.cuts)
    exchange_(model, saved.plan.drops)
    linearize_(model, saved.plan.lines)
    refold_(model, saved.plan.foldings)
    take_out_(model, saved.plan.compacted)
    _check_pruned(model, saved)
    _fill_(model, tensors, saved)
    for path, module in model.named_modules():
        module.training = saved.training != (path in saved.exceptions)
    remember(model, saved.plan, saved.dense)
    return model


def _read(root: Path) -> Saved:
    for name in (PLAN, WEIGHTS):
        if not (root / name).is_file():
            raise _damaged(root, f"there is no {name}", "pass a directory that otp.save wrote.")
    if format_of(root / PLAN) != "torch_otprune":
        raise _damaged(root, f"its {PLAN} is cut short or not ours", "save the model again.")
    content = json.loads((root / PLAN).read_text(encoding="utf-8"))
    try:
        saved = Saved.model_validate(content)
    except (ValueError, OTPruneError) as error:
        reason = str(error).splitlines()[0]
        fix = "load it with the library version it names, or save the model again."
        raise _damaged(root, f"its {PLAN} cannot be read: {reason}", fix) from error
    # Hashed as written: a later library may add fields with defaults.
    text = json.dumps(content["plan"], sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(text.encode()).hexdigest() != saved.plan_hash:
        raise _damaged(root, "its plan was edited: the hash differs", "save the model again.")
    return saved


def _read_weights(root: Path, saved: Saved) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if digest(root / WEIGHTS) != saved.weights:
        reason = f"its {WEIGHTS} is truncated or from another save: the hash differs"
        raise _damaged(root, reason, "copy the directory again, both files together.")
    return load_file(root / WEIGHTS)


def _damaged(root: Path, reason: str, fix: str) -> LoadError:
    return LoadError(f"this is no saved model: {reason}.", where=str(root), fix=fix)


def _called(factory: Callable[[], nn.Module]) -> object:
    if not callable(factory):
        return None
    try:
        return factory()
    except Exception as error:  # the user's code may raise anything
        raise LoadError(
            f"calling the factory failed: {type(error).__name__}: {error}",
            where=f"load, factory {getattr(factory, '__name__', factory)}",
            fix="pass a callable without arguments, such as `lambda: Net(width=64)`.",
        ) from error


def _build(factory: Callable[[], nn.Module]) -> nn.Module:
    model = _called(factory) if not isinstance(factory, nn.Module) else None
    if not isinstance(model, nn.Module):
        raise LoadError(
            f"the factory is a {type(factory).__name__} that builds no module when called.",
            where="load, factory",
            fix="pass a callable that builds the dense model, such as the model's class.",
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise LoadError(
            "the factory builds its model on the meta device.",
            where="load, factory",
            fix="build it on a real device.",
        )
    return model


def _check_dense(model: nn.Module, saved: Saved) -> None:
    if fingerprint(model) == saved.plan.fingerprint:
        return
    known = _difference(layout(model), saved.dense) if saved.dense else None
    difference = known or _missing(model, saved.plan)
    raise LoadError(
        difference or "the factory's model has other tensors than the one that was pruned.",
        where=f"load, factory of {type(model).__name__}",
        fix="pass a factory that builds the dense model exactly as it was when pruned.",
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
    if difference := _difference(_shapes(layout(model)), _shapes(saved.tensors)):
        raise LoadError(
            difference,
            where=f"load, {type(model).__name__} after its cut",
            fix="save again with the plan that pruned the model last.",
        )


def _shapes(described: Mapping[str, str]) -> dict[str, str]:
    return {name: description.split(":")[0] for name, description in described.items()}


def _difference(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """Name the first tensor that differs."""
    for name in sorted(here.keys() | there.keys()):
        if name not in there:
            return f"the factory's model has '{name}', the saved one has not."
        if name not in here:
            return f"the factory's model has no '{name}', the saved one has."
        if here[name] != there[name]:
            return f"'{name}' is {here[name]} in the factory's model, {there[name]} in the saved."
    return None


def _fill_(model: nn.Module, tensors: Mapping[str, Tensor], saved: Saved) -> None:
    """Assign every stored tensor, tied ones as one object under all their names."""
    places: dict[str, Tensor] = {**model.state_dict(keep_vars=True), **transient(model)}
    values: dict[str, Tensor] = {}
    for name, place in places.items():
        stored = saved.aliases.get(name, name)
        if stored not in values and stored in tensors:
            value = _arranged(tensors[stored], saved.strides.get(stored)).to(place.device)
            tied = isinstance(place, nn.Parameter)
            values[stored] = nn.Parameter(value, place.requires_grad) if tied else value
        if stored in values:
            values[name] = values[stored]
    for name in saved.transient:
        owner, _, leaf = name.rpartition(".")
        if name in values:
            setattr(model.get_submodule(owner), leaf, values.pop(name))
    model.load_state_dict(values, strict=True, assign=True)


def _arranged(tensor: Tensor, stride: tuple[int, ...] | None) -> Tensor:
    """Lay a tensor out in memory as it was: a copy to a device keeps dense formats."""
    if stride is None:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
