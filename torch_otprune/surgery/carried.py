"""A plan as part of a model's configuration, from where `save_pretrained` takes it along.

Transformers writes a configuration beside the weights and asks what its `quantization_config`
names to prepare the empty model before they are read: that is where the plan is put.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from torch_otprune.errors import LoadError
from torch_otprune.plan.model import Plan
from torch_otprune.surgery.layout import is_config
from torch_otprune.surgery.reload import unlike_config
from torch_otprune.surgery.uniform import fit_config_

__all__ = ["FIELD", "METHOD", "Hosted", "base_of", "carried", "inscribe_", "pack", "unpack"]

FIELD, METHOD = "quantization_config", "otprune"
_VERSION = 1
_UNREAD = "the plan in the configuration cannot be read: {}."
_SAVE_AGAIN = {
    "where": f"config.json, {FIELD}",
    "fix": "save the model again, or load it with the library version that the plan names.",
}
# What changes with every save, or says nothing about the modules.
_APART = frozenset((FIELD, "transformers_version", "dtype", "architectures", "_name_or_path"))


@runtime_checkable
class Hosted(Protocol):
    """A model that writes itself to a directory, as Transformers' do."""

    base_model_prefix: str

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write it."""


def inscribe_(model: nn.Module, plan: Plan, dense: nn.Module) -> None:
    """Let a pruned model's configuration say all that it takes to build the model again.

    Where the plain fields say it already, nothing is added: any Transformers can read that.

    Args:
        model: the pruned model; its configuration is exchanged for a copy.
        plan: what was carried out on it.
        dense: the model before.

    Raises:
        PlanError: if the policy asks for a uniform model and the configuration cannot say it.
    """
    if plan.policy.serving == "uniform":
        fit_config_(model, plan.cuts)
    if not isinstance(model, Hosted) or not is_config(vars(model).get("config")):
        return
    config = vars(model)["config"]
    known = plan.policy.serving == "registered" and bool(unlike_config(model))
    said = _said(model, plan, vars(dense)["config"]) if known else None
    if said is None and carried(config) is None:
        return
    now = copy.copy(config)
    vars(now).pop(FIELD, None)
    if said is not None:
        setattr(now, FIELD, said)
    for module in model.modules():
        fields = vars(module)
        fields.update({key: now for key, value in fields.items() if value is config})


def carried(config: object) -> dict[str, Any] | None:
    """Read what an earlier pruning has left in a configuration.

    Args:
        config: of any kind.

    Returns:
        the entry; None if there is none, or it is somebody else's.
    """
    found = vars(config).get(FIELD)
    ours = isinstance(found, Mapping) and found.get("quant_method") == METHOD
    return dict(found) if ours and isinstance(found, Mapping) else None


def base_of(model: nn.Module) -> str:
    """Name the part of a model that all its kinds have in common.

    Args:
        model: any module.

    Returns:
        its path; nothing where the model itself is that part.
    """
    prefix = model.base_model_prefix if isinstance(model, Hosted) else ""
    return prefix if prefix in model._modules else ""


def _said(model: nn.Module, plan: Plan, before: Any) -> dict[str, Any]:
    """Write down the plans that led here, and what the configuration said at the beginning."""
    first = carried(before) or {"dense": {}, "plans": []}
    changed = _changed(before.to_dict(), vars(model)["config"].to_dict())
    return {
        "quant_method": METHOD,
        "version": _VERSION,
        "made": type(model).__name__,
        "base": base_of(model),
        "dense": _over(changed, first["dense"]),
        "plans": [*first["plans"], pack(plan)],
    }


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """List the fields that differ, with what they said before; parts have fields of their own."""
    found: dict[str, Any] = {}
    for key, value in before.items():
        now = after.get(key)
        if key in _APART or value == now:
            continue
        part = isinstance(value, Mapping) and isinstance(now, Mapping) and "model_type" in value
        found[key] = _changed(value, now) if part else value  # type: ignore[arg-type]
    return found


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Join two sets of fields; where both speak, the second is right."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _over(found[key], value) if both else value
    return found


def pack(plan: Plan) -> dict[str, Any]:
    """Write a plan as plain data, with every set of kept units once and short.

    Args:
        plan: any plan.

    Returns:
        what `unpack` reads.
    """
    said = plan.model_dump(mode="json")
    table: dict[str, int] = {}
    for part in _parts(said):
        part["keep"] = table.setdefault(_short(part["keep"]), len(table))
    return {"hash": plan.hash, "kept": list(table), "plan": said}


def unpack(packed: Mapping[str, Any], rename: Callable[[str], str | None] | None = None) -> Plan:
    """Read what `pack` wrote.

    Args:
        packed: plain data.
        rename: what to call a module instead; None for one that is not there.

    Returns:
        the plan.

    Raises:
        LoadError: if it was edited, or is of another version.
    """
    try:
        said = copy.deepcopy(packed["plan"])
        kept = [_long(text) for text in packed["kept"]]
        for part in _parts(said):
            part["keep"] = kept[part["keep"]]
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != packed["hash"]:
            raise LoadError(_UNREAD.format("its hash differs, so it was edited"), **_SAVE_AGAIN)
        return Plan.model_validate(said if rename is None else _renamed(said, rename))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise LoadError(_UNREAD.format(reason), **_SAVE_AGAIN) from error


def _parts(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [part for cut in said["cuts"] for part in (cut, *cut["slices"])]


def _short(keep: Iterable[int]) -> str:
    """Write sorted numbers as runs, or bit by bit where that is shorter."""
    runs: list[list[int]] = []
    bits = bytearray()
    for number in keep:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
        bits.extend(bytes(number // 8 + 1 - len(bits)))
        bits[number // 8] |= 1 << number % 8
    text = ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
    mask = f"={base64.b64encode(bits).decode()}"
    return min(text, mask, key=len)


def _long(text: str) -> list[int]:
    if text.startswith("="):
        bits = base64.b64decode(text[1:])
        return [8 * i + j for i, byte in enumerate(bits) for j in range(8) if byte >> j & 1]
    ends = [run.partition("-")[::2] for run in text.split(",")]
    return [n for first, last in ends for n in range(int(first), int(last or first) + 1)]


def _renamed(said: dict[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """Call modules what they are called in another model around the same base."""

    def names(paths: Iterable[str]) -> list[str]:
        return [new for path in paths if (new := rename(path)) is not None]

    def moved(entries: Iterable[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
        found = [{**entry, **{key: _one(rename, entry[key]) for key in keys}} for entry in entries]
        return [entry for entry in found if entry[keys[0]] is not None]

    for cut in said["cuts"]:
        cut["group"] = rename(cut["group"]) or cut["group"]
        cut["slices"] = moved(cut["slices"], "path")
    for drop in said["drops"]:
        drop["block"] = rename(drop["block"]) or drop["block"]
        drop["swaps"] = moved(drop["swaps"], "path", "like")
    said["lines"] = moved(said["lines"], "site", "into")
    for folding in said["foldings"]:
        folding.update({key: names(folding[key]) for key in ("layers", "idle", "lines")})
    said["foldings"] = moved(said["foldings"], "into", "writes")
    said["compacted"] = names(said["compacted"])
    return said


def _one(rename: Callable[[str], str | None], path: str | None) -> str | None:
    return rename(path) if path else path
