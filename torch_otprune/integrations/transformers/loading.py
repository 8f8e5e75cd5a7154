"""A pruned model out of its directory: the dense one is built empty, cut, and then filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_otprune.errors import LoadError, PlanError
from torch_otprune.store import remember
from torch_otprune.store.carry import carry_
from torch_otprune.structure.fingerprint import fingerprint
from torch_otprune.structure.layers import bare
from torch_otprune.surgery.carried import FIELD, base_of, unpack
from torch_otprune.surgery.layout import is_config

__all__ = ["rebuild_", "release_", "widen_"]

_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


def widen_(config: Any, said: Mapping[str, Any]) -> None:
    """Let a configuration say what it said before the first pruning.

    Args:
        config: as read; written in place.
        said: what it carries.
    """
    _restore_(config, said["dense"])


def _restore_(config: Any, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        part = vars(config).get(key)
        if is_config(part) and isinstance(value, Mapping):
            _restore_(part, value)
        else:
            vars(config)[key] = value


def rebuild_(
    model: nn.Module, said: Mapping[str, Any], files: Iterable[str], *, seen: bool
) -> None:
    """Carry out on an empty dense model what was carried out before it was saved.

    Args:
        model: on the meta device; written in place.
        said: what its configuration carries.
        files: the weights that will be read.
        seen: whether the configuration could be widened before the model was built.

    Raises:
        LoadError: if the plan is for another model, or the weights are.
    """
    import torch_otprune.pipeline  # noqa: F401  # fills the tables that a plan's policy names

    if not seen:
        raise LoadError(
            "this Transformers builds a model before it shows us the configuration.",
            where="quantizers.auto.get_hf_quantizer",
            fix="install Transformers 5.23 or newer, or keep models with otp.save.",
        )
    rename = _rename(model, said)
    for packed in said["plans"]:
        plan = unpack(packed, rename)
        # Types may differ from those of the pruning, and so may heads: shapes are checked below.
        own = plan.model_copy(update={"fingerprint": fingerprint(model)})
        try:
            with torch.device("cpu"):  # numbers that folds work with; the model's stay on meta
                carry_(model, own)
        except PlanError as error:
            raise LoadError(
                f"the plan in the configuration is for another model: {error.problem}",
                where=error.where,
                fix="restore config.json as it was saved.",
            ) from error
    _check_weights(model, said, files)


def _rename(model: nn.Module, said: Mapping[str, Any]) -> Callable[[str], str | None] | None:
    """Find a module in a model with another head; None where the model is of the same class."""
    there, here = said["base"], base_of(model)
    if type(model).__name__ == said["made"]:
        return None
    names = {name for name, _ in model.named_modules()}
    names |= {name for name, _ in model.named_parameters()}

    def find(path: str) -> str | None:
        inner = path.removeprefix(f"{there}.") if there else path
        if here and (not there or inner != path):  # else it is a head, beside the body
            inner = f"{here}.{inner}"
        known = bare(inner)[0].removesuffix(".*") in names
        return inner if known else None  # a body without a pooler, another head

    return find


def _check_weights(model: nn.Module, said: Mapping[str, Any], files: Iterable[str]) -> None:
    """Name the first tensor that the files hold in another shape, or do not hold."""
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        if Path(file).suffix == ".safetensors":
            stored |= _shapes(file)
    state = model.state_dict()
    tied = {name for pair in vars(model).get("all_tied_weights_keys", {}).items() for name in pair}
    for name, tensor in state.items():
        if name in stored and stored[name] != tuple(tensor.shape):
            wrong = f"'{name}' is {list(stored[name])} there, {list(tensor.shape)} in the model"
            raise _unfit(wrong)
    missing = [name for name in state if name not in stored and name not in tied]
    foreign = [name for name in stored if name not in state]
    same = type(model).__name__ == said["made"]
    if stored and same and bool(missing) != bool(foreign):  # both: they are stored otherwise
        raise _unfit(f"'{[*missing, *foreign][0]}' is only in one of them")


def _unfit(reason: str) -> LoadError:
    return LoadError(
        f"the weights do not belong to this configuration: {reason}.",
        where=f"config.json, {FIELD}; model.safetensors",
        fix="copy the directory again, all files together.",
    )


def _shapes(file: str) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        return {name: tuple(opened.get_slice(name).get_shape()) for name in names}


def release_(model: Any, said: Mapping[str, Any]) -> None:
    """Make an ordinary model of it: what refuses quantised ones must not refuse this one.

    Args:
        model: loaded; written in place.
        said: what its configuration carries.
    """
    model.config.quantization_config = dict(said)
    for name in _MARKS:
        vars(model).pop(name, None)
    for module in model.modules():
        for value in vars(module).values():
            if is_config(value):
                vars(value).pop("_is_quantized", None)
    remember(model, unpack(said["plans"][-1], _rename(model, said)))
