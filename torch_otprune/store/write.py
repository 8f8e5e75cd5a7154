"""Save a pruned model, complete or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import LoadError, PlanError
from torch_otprune.plan.model import Plan
from torch_otprune.report.measure import count_params
from torch_otprune.store.files import PLAN, WEIGHTS, Saved, digest, format_of, transient
from torch_otprune.store.plans import dense_of, plan_of
from torch_otprune.structure.fingerprint import fingerprint_of, layout
from torch_otprune.structure.layers import axes, channels

__all__ = ["save"]

_PLAIN: Any = {"device": "meta", "memory_format": torch.contiguous_format}


def save(model: nn.Module, directory: str | Path, *, plan: Plan | None = None) -> Path:
    """Write a pruned model: safetensors and JSON, complete or not at all.

    Args:
        model: the pruned model; left as it was.
        directory: new, empty, or an earlier save, which is replaced.
        plan: what pruned it; found by itself if this very object was pruned or loaded in
            this process.

    Returns:
        the directory.

    Raises:
        PlanError: if the plan is unknown or does not lead to this model.
        LoadError: if the directory is someone else's or cannot be written, or a tensor
            cannot be stored without pickle.

    Limits: what is neither parameter nor buffer (a tensor in a plain attribute) comes from the
        factory when loaded.
    """
    plan = plan_of(model) if plan is None else plan
    _check_size(model, plan)
    target = Path(directory).resolve()  # a link stays a link
    _check_target(target)
    tensors, aliases = _unique(model)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        _write(aside, tensors, _describe(model, plan, aliases))
        _swap(aside, target)
    except OSError as error:
        raise LoadError(
            f"the model cannot be saved: {(error.strerror or str(error)).rstrip('.')}.",
            where=str(target),
            fix="pass a directory that you may write to, on a disk with room.",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _check_size(model: nn.Module, plan: Plan) -> None:
    if (size := count_params(model)) != plan.params.after:
        raise PlanError(
            f"the plan leaves {plan.params.after:,} parameters, this model has {size:,}.",
            where=f"save, plan {plan.hash[:12]}",
            fix="save the model that the plan was applied to, before it is changed again.",
        )


def _check_target(target: Path) -> None:
    """Refuse to replace anything but an earlier save."""
    if not target.exists():
        return
    if not target.is_dir():
        raise _occupied(target, "it is a file")
    inside = sorted(path.name for path in target.iterdir())
    foreign = [name for name in inside if name not in (WEIGHTS, PLAN)]
    if foreign:
        raise _occupied(target, f"it holds {', '.join(foreign[:3])}")
    if inside and format_of(target / PLAN) != "torch_otprune":
        raise _occupied(target, f"its {PLAN} is not ours")


def _occupied(target: Path, reason: str) -> LoadError:
    return LoadError(
        f"the model cannot be saved there: {reason}.",
        where=str(target),
        fix="name a new or empty directory, or one that otp.save wrote.",
    )


def _unique(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy every tensor once, and list the further names of tied ones."""
    first: dict[object, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in {**model.state_dict(keep_vars=True), **transient(model)}.items():
        _check_storable(name, value)
        stored = first.setdefault(_identity(value), name)
        if stored != name:
            aliases[name] = stored
        else:
            # A copy is contiguous and shares no memory, which the format insists on.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _identity(tensor: Tensor) -> object:
    """Tell tensors apart that do not share all their memory in one arrangement."""
    if tensor.numel() == 0:
        return id(tensor)
    place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    return (isinstance(tensor, nn.Parameter), *place)


def _check_storable(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        what = f"an extra state of type {type(value).__name__}"
    elif value.is_meta or value.is_quantized or value.layout is not torch.strided:
        what = f"a {'meta' if value.is_meta else value.dtype} tensor of layout {value.layout}"
    elif value.dtype == torch.complex128:
        what = "of type torch.complex128"
    else:
        return
    raise LoadError(
        f"'{name}' is {what}, which safetensors cannot hold.",
        where="otp.save",
        fix="make it a dense float, complex64 or integer tensor, or save the model yourself.",
    )


def _describe(model: nn.Module, plan: Plan, aliases: Mapping[str, str]) -> dict[str, Any]:
    described = layout(model)
    flags = {path: module.training for path, module in model.named_modules()}
    return {
        "plan": plan,
        "plan_hash": plan.hash,
        "seed": plan.policy.seed,
        "calibration": plan.calibration,
        "fingerprint": fingerprint_of(described),
        "tensors": described,
        "dense": _dense(model, plan, described),
        "aliases": dict(aliases),
        "strides": _strides({**model.state_dict(), **transient(model)}),
        "transient": tuple(transient(model)),
        "training": model.training,
        "exceptions": tuple(path for path, flag in flags.items() if flag != model.training),
        "versions": _versions(),
    }


def _strides(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Note memory formats: a kernel may round differently on another one."""
    return {
        name: tensor.stride()
        for name, tensor in tensors.items()
        # Not `is_contiguous`: it overlooks the strides of axes of size 1, kernels do not.
        if tensor.stride() != torch.empty_like(tensor, **_PLAIN).stride() and not _overlaps(tensor)
    }


def _overlaps(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _dense(model: nn.Module, plan: Plan, described: Mapping[str, str]) -> dict[str, str]:
    """Look the dense layout up, or work it back from the slices; empty if that is not it."""
    if known := dense_of(plan):
        return known
    dense, modules = dict(described), dict(model.named_modules())
    for piece in (piece for cut in plan.cuts for piece in cut.slices):
        if (module := modules.get(piece.path)) is None:  # a bare parameter
            continue
        for tensor, axis in axes(module, piece.side):
            name = f"{piece.path}.{tensor}"
            pruned, sizes = _sizes(described[name]), _sizes(dense[name])
            # A grouped filter holds a share of its input channels: scale, do not copy.
            sizes[axis] = piece.size * pruned[axis] // (channels(module, piece.side) or 1)
            dtype = described[name].partition(":")[2]
            dense[name] = f"{'x'.join(map(str, sizes))}:{dtype}"
    return dense if fingerprint_of(dense) == plan.fingerprint else {}


def _sizes(description: str) -> list[int]:
    return [int(size) for size in description.partition(":")[0].split("x")]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torch_otprune", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _write(aside: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights, plan = aside / WEIGHTS, aside / PLAN
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
    except SafetensorError as error:  # how it spells a full disk
        raise OSError(str(error)) from error
    saved = Saved(weights=digest(weights), **description)
    plan.write_text(json.dumps(saved.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    shutil.copymode(plan, weights)  # safetensors makes files that only the owner can read
    for path in (weights, plan):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _swap(aside: Path, target: Path) -> None:
    """Put the finished directory in place; a reader sees the old one, none, or the new one."""
    old = aside.with_name(f"{aside.name}.old")
    if target.exists():
        target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
