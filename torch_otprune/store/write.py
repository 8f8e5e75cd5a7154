"""Save a pruned model, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torch_otprune.errors import PlanError
from torch_otprune.plan.model import Plan
from torch_otprune.report.measure import count_params
from torch_otprune.store.atomic import put
from torch_otprune.store.files import Mark, Saved, Stored, check_target, sealed
from torch_otprune.store.parts import describe
from torch_otprune.store.plans import dense_of, known_of, plan_of
from torch_otprune.store.shards import bytes_of, write_shards
from torch_otprune.store.state import state_of
from torch_otprune.structure.eager import is_optimised
from torch_otprune.structure.fingerprint import fingerprint_of, layout
from torch_otprune.structure.layers import axes, channels

__all__ = ["save", "write_page"]

SHARD = "1GB"


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    plan: Plan | None = None,
    shard: str | int = SHARD,
) -> Path:
    """Write a pruned model: safetensors and JSON, complete or not at all.

    Args:
        model: the pruned model; left as it was. No second copy of it is made in memory.
        directory: new, empty, or an earlier save, which is replaced.
        plan: what pruned it; found by itself if this very object was pruned or loaded in
            this process.
        shard: size above which the weights are split into several files with an index:
            bytes, or such as "1GB".

    Returns:
        the directory.

    Raises:
        PlanError: if the plan is unknown or does not lead to this model, or this is a wrapper
            around the one that was pruned.
        LoadError: if the directory is someone else's or cannot be written, a tensor cannot be
            stored without pickle, or the size is none.

    Limits: what is neither parameter, buffer nor plain attribute (a tensor in a plain attribute)
        comes from the factory when loaded; tensors that share a part of their memory come back
        with memory of their own.
    """
    _check_bare(model, plan)
    plan = plan_of(model) if plan is None else plan
    limit = bytes_of(shard, where="save(shard=)")
    _check_size(model, plan)
    target = Path(directory).resolve()  # a link stays a link
    check_target(target, Saved)
    state = state_of(model)
    tensors, aliases = state.unique()
    described, known = layout(model), dense_of(plan, model)
    page: dict[str, Any] = {
        **state.page(aliases),
        "plan": plan,
        "plan_hash": plan.hash,
        "seed": plan.policy.seed,
        "calibration": plan.calibration,
        "fingerprint": fingerprint_of(described),
        "tensors": described,
        "parts": describe(model),
        "dense": known.layout or _dense(model, plan, described),
        "dense_parts": known.parts,
    }

    def made(files: dict[str, Mark]) -> Saved:
        return Saved(files=files, **page)

    put(target, lambda aside: write_page(aside, tensors, limit, make=made))
    return target


def write_page(
    aside: Path,
    tensors: Mapping[str, Tensor],
    limit: int,
    *,
    make: Callable[[dict[str, Mark]], Stored],
) -> None:
    """Write tensors and the page that describes them.

    Args:
        aside: an empty directory.
        tensors: each once.
        limit: bytes of tensors per file.
        make: makes the page, told what else was written.

    Raises:
        OSError: if the disk is full, or a file cannot be written.
    """
    stored = make(write_shards(aside, tensors, limit))
    (aside / stored.page).write_text(sealed(stored), encoding="utf-8")


def _check_bare(model: nn.Module, plan: Plan | None) -> None:
    """Refuse a wrapper: its tensors have names that the plan does not know."""
    if (inner := _wrapped(model, plan)) is not None:
        raise PlanError(
            f"this {type(model).__name__} is a wrapper around the model that was pruned.",
            where="save, model",
            fix=f"save the model inside it: otp.save(model.{inner}, directory).",
        )


def _wrapped(model: nn.Module, plan: Plan | None) -> str | None:
    """Name the attribute that holds the pruned model; None where this is no wrapper of it."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    if is_optimised(model):
        return "_orig_mod"
    if known_of(model) is not None:
        return None
    known = ((name, known_of(child)) for name, child in model.named_children())
    pruned = (name for name, own in known if own and (plan is None or plan.hash == own[0].hash))
    return next(pruned, None)


def _check_size(model: nn.Module, plan: Plan) -> None:
    if (size := count_params(model)) != plan.params.after:
        raise PlanError(
            f"the plan leaves {plan.params.after:,} parameters, this model has {size:,}.",
            where=f"save, plan {plan.hash[:12]}",
            fix="save the model that the plan was applied to, before it is changed again.",
        )


def _dense(model: nn.Module, plan: Plan, described: Mapping[str, str]) -> dict[str, str]:
    """Work the dense layout back from the slices; empty if that is not it."""
    dense, modules = dict(described), dict(model.named_modules())
    for piece in (piece for cut in plan.cuts for piece in cut.slices):
        if (module := modules.get(piece.path)) is None:  # a bare parameter
            continue
        for tensor, axis in axes(module, piece.side):
            name = f"{piece.path}.{tensor}"
            if name not in dense:  # computed by a parametrisation
                continue
            pruned, sizes = _sizes(described[name]), _sizes(dense[name])
            # A grouped filter holds a share of its input channels: scale, do not copy.
            sizes[axis] = piece.size * pruned[axis] // (channels(module, piece.side) or 1)
            dtype = described[name].partition(":")[2]
            dense[name] = f"{'x'.join(map(str, sizes))}:{dtype}"
    return dense if fingerprint_of(dense) == plan.fingerprint else {}


def _sizes(description: str) -> list[int]:
    return [int(size) for size in description.partition(":")[0].split("x")]
