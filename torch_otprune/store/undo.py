"""The way back on disk: the dense model beside a pruned one, to be restored in any process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import LoadError
from torch_otprune.plan.model import Plan
from torch_otprune.store.atomic import put, rescued
from torch_otprune.store.carry import places
from torch_otprune.store.configs import field_changes, put_fields_, sharing
from torch_otprune.store.files import Mark, Way, check_target, opened
from torch_otprune.store.fill import finish_
from torch_otprune.store.parts import put_back_
from torch_otprune.store.plans import forget, remember
from torch_otprune.store.read import build, check_parts, first_difference, shapes
from torch_otprune.store.refill import refill_, retree_
from torch_otprune.store.shards import bytes_of, check_shards, tensors_of
from torch_otprune.store.state import State, check_storable, identity
from torch_otprune.store.write import write_page
from torch_otprune.structure.fingerprint import fingerprint, layout
from torch_otprune.surgery.compact import renamed
from torch_otprune.surgery.layout import forget_recorders_

if TYPE_CHECKING:
    from torch_otprune.store.plans import WayBack

__all__ = ["save_undo", "undo_"]


def save_undo(way: WayBack, directory: Path, *, shard: str | int) -> Path:
    """Write the dense model beside what leads back to it.

    All of it: a pruned model is trained further, so that no tensor of it can be counted on.

    Args:
        way: what `report.undo_` would call.
        directory: new, empty, or an earlier one of its kind, which is replaced.
        shard: size above which the tensors are split into several files.

    Returns:
        the directory.

    Raises:
        PlanError: if the model was pruned again since.
        LoadError: if the directory is someone else's or cannot be written, or a tensor cannot be
            stored without pickle.
    """
    way.check("Report.save_undo")
    limit, target = bytes_of(shard, where="save_undo(shard=)"), directory.resolve()
    check_target(target, Way)
    model, plan, dense = way.snapshot.model, way.plan, way.known
    state, parameters = _dense_state(way, set(dense.layout))
    tensors, aliases = state.unique()
    plan_before, before = way.before or (None, None)
    page: dict[str, Any] = {
        **state.page(aliases),
        "plan": plan,
        "plan_hash": plan.hash,
        "fingerprint": plan.fingerprint,
        "tensors": dense.layout,
        "parts": dense.parts,
        "parameters": parameters,
        "pruned": layout(model),
        "configs": field_changes(way.snapshot.modules()),
        "shared": sharing(way.snapshot.modules()),
        "before": plan_before,
        "before_dense": {} if before is None else before.layout,
        "before_parts": None if before is None else before.parts,
    }

    def made(files: dict[str, Mark]) -> Way:
        return Way(files=files, **page)

    put(target, lambda aside: write_page(aside, tensors, limit, make=made), what="dense model")
    return target


def _dense_state(way: WayBack, state: set[str]) -> tuple[State, tuple[str, ...]]:
    """Gather the old values by their names; what was one tensor is one again."""
    values: dict[object, Tensor] = {}
    named, frozen, parameters = dict[str, Tensor](), list[str](), list[str]()
    for name, tensor, memory, value in way.snapshot.tensors():
        check_storable(name, value, where="Report.save_undo")
        mark = isinstance(tensor, nn.Parameter), identity(memory)
        named[name] = values.setdefault(mark, value)
        if isinstance(tensor, nn.Parameter):
            parameters.append(name)
            frozen += [] if tensor.requires_grad else [name]
    flags = {path: bool(said["training"]) for path, _, said in way.snapshot.modules()}
    outside = tuple(name for name in named if name not in state)
    return State(named, outside, tuple(frozen), flags, {}), tuple(parameters)


def undo_(
    model: nn.Module,
    directory: str | Path,
    *,
    factory: Callable[[], nn.Module] | None = None,
) -> None:
    """Turn a pruned model back into the dense one, bit for bit, in any process.

    Modules that are still there stay the same objects, and so do their parameters; the others
    come from the factory. Works as well if the pruned model was trained or cast since.

    Args:
        model: pruned in this process, or loaded; written in place, on the device where it is.
        directory: what `report.save_undo` wrote.
        factory: builds the dense model; its weights do not matter. Needed only where the pruning
            took modules out or put others in their place.

    Raises:
        LoadError: if the directory is incomplete, damaged or not ours, the model is not the
            pruned one, or a factory is needed, or builds another model. The model is as it was.

    Limits: private attributes and plain attributes that are no literals, such as functions, stay
        as they are in the modules that are still there. Memory holds both models for a moment.
    """
    root = rescued(Path(directory))
    way = opened(root, Way)
    headers = check_shards(root, way)
    if difference := first_difference(shapes(layout(model)), shapes(way.pruned), of="this model"):
        raise LoadError(
            f"this is not the model that was pruned: {difference}",
            where=f"undo_, {type(model).__name__}",
            fix="pass the pruned model, as otp.load gives it.",
        )
    chosen, grafted = _chosen(model, way, factory)
    values = dict(tensors_of(root, way, headers))  # all of it, before the first write
    with torch.inference_mode(mode=False), torch.no_grad():
        _write_(model, way, chosen, values)
    if grafted:
        forget_recorders_(model)


def _write_(
    model: nn.Module, way: Way, chosen: Mapping[str, nn.Module], values: Mapping[str, Tensor]
) -> None:
    assert way.parts is not None
    device = next((t.device for _, _, t in places(model)), torch.device("cpu"))
    retree_(chosen)
    refill_(chosen, way, values, device)
    put_back_(model, way.parts)
    put_fields_(model, way.configs, way.shared)
    finish_(model, way)
    forget(model)
    if way.before is not None:
        remember(model, way.before, way.before_dense, parts=way.before_parts)


def _chosen(
    model: nn.Module, way: Way, factory: Callable[[], nn.Module] | None
) -> tuple[dict[str, nn.Module], bool]:
    """Find a module for every path of the dense model: the one that is there, or the factory's."""
    assert way.parts is not None
    modules = dict(model.named_modules(remove_duplicate=False))
    now = renamed(way.parts.modules, way.plan.compacted)
    chosen, missing = dict[str, nn.Module](), list[str]()
    for path in way.parts.modules:
        found = modules.get(now[path]) if path in now else None
        kind = way.parts.of(path)[0]
        if found is None or type(found).__name__ != kind or _exchanged(way.plan, path):
            missing.append(path)
        else:
            chosen[path] = found
    if missing:
        _check_root(model, missing, way)
        built = dict(_dense(way, factory, missing[0]).named_modules(remove_duplicate=False))
        chosen |= {path: built[path] for path in missing}
    return {path: chosen[path] for path in way.parts.modules}, bool(missing)  # in their order


def _check_root(model: nn.Module, missing: list[str], way: Way) -> None:
    """Make sure that the model itself is not what is missing: it cannot be exchanged in place."""
    assert way.parts is not None
    if "" in missing:
        raise LoadError(
            f"this is a {type(model).__name__}, a {way.parts.of('')[0]} was pruned.",
            where="undo_",
            fix="pass the pruned model itself, without a wrapper around it.",
        )


def _exchanged(plan: Plan, path: str) -> bool:
    """Tell whether another module stands where one was, though maybe of the same class."""
    heads = {swap.path for drop in plan.drops for swap in drop.swaps}
    alone = {line.site for line in plan.lines}
    alone |= {x.into for x in plan.lines if x.into is not None and x.surrogate != "identity"}
    alone |= {name for f in plan.foldings for name in (*f.layers, *f.idle)}
    return path in heads | alone or any(path.startswith(f"{head}.") for head in heads)


def _dense(way: Way, factory: Callable[[], nn.Module] | None, missing: str) -> nn.Module:
    """Build the dense model, and make sure that it is the one that was pruned."""
    if factory is None:
        raise LoadError(
            f"the pruning took '{missing}' out, or put another module in its place.",
            where="undo_, factory",
            fix="pass factory=, a callable that builds the dense model: undo_(model, directory, "
            "factory=Net).",
        )
    dense, where = build(factory, where="undo_"), "undo_, factory"
    if fingerprint(dense) != way.fingerprint:
        raise LoadError(
            first_difference(layout(dense), way.tensors)
            or "the factory's model has other tensors than the one that was pruned.",
            where=where,
            fix="pass a factory that builds the dense model exactly as it was when pruned.",
        )
    assert way.parts is not None
    check_parts(dense, way.parts, factory, where=where, strict=True)
    return dense
