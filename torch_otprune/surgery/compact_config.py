"""What a model says about its depth, put right after entries of a list are gone."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_otprune.surgery.layout import is_config

__all__ = ["Place", "place_of", "retype_", "shorten_", "types_of"]

_GENERIC = re.compile(
    r"(num_|n_)(hidden_|transformer_)?(layers?|blocks?)|num_hidden_groups|depth|layers"
)
_SIDED = re.compile(r"(num_|n_)?(encoder|decoder)_(num_|n_)?(hidden_)?(layers?|depth)")
_STAGED = re.compile(r"(\w+_)?depths|(stage_)?num_blocks|(num_)?layers(_per_stage)?")
_SIDES = ("encoder", "decoder")

# Values by layer, whatever the name says otherwise.
_BY_LAYER = re.compile(r".*(layer|block).*")
_ALSO_BY_LAYER = frozenset(
    """
    kv_sharing_modes indexer_types swiglu_limits swiglu_limits_shared attn_type_list
    activation_sparsity_pattern intermediate_size num_attention_heads num_key_value_heads
    num_query_heads num_kv_heads ffn_multipliers attention_types
    """.split()
)
# Lists of layer numbers.
_NUMBERS = re.compile(
    r"\w+_(ids|indices|indexes|idxs)|(mlp_only|moe|rope_scaling|subsample|cross_attention)_layers"
)
# These choose outputs, or belong to layers that are no entries of the stack.
_APART = re.compile(r"(mtp|conv|out)_.*|.*(feature|deepstack|proj).*")
# The first so many layers are special.
_LEADING = frozenset("first_k_dense_replace num_dense_layers max_window_layers".split())


@dataclass(frozen=True)
class Place:
    """Where a list of layers sits.

    Args:
        path: of the list.
        chain: the modules around it, innermost first, with their paths.
        side: `encoder`, `decoder`, or nothing where the path names neither.
        stage: which entry of an outer list it is in; None where there is no outer list.
    """

    path: str
    chain: tuple[tuple[str, nn.Module], ...]
    side: str
    stage: int | None


def place_of(model: nn.Module, path: str) -> Place:
    """Describe where a list sits.

    Args:
        model: the whole model.
        path: of the list.

    Returns:
        the place.
    """
    parts = path.split(".") if path else []
    around = [".".join(parts[:i]) for i in reversed(range(len(parts)))]
    chain = tuple((name, model.get_submodule(name)) for name in around)
    side = next((p for p in reversed(parts) if p in _SIDES), "")
    stage = None
    for name, module in chain:
        inner = parts[len(name.split(".")) if name else 0]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and inner.isdecimal():
            stage = int(inner)
            break
    return Place(path, chain, side, stage)


def shorten_(model: nn.Module, place: Place, count: int, gone: Collection[int]) -> None:
    """Put configurations and plain attributes right.

    Configurations are replaced by copies, since another model may have been built from them.

    Args:
        model: the whole model.
        place: of the list.
        count: its entries before.
        gone: numbers of the entries that went.
    """
    edits = {id(c): _edited(c, role, place, count, gone) for c, role in _configs(model, place)}
    _edit_(model, {key: edit for key, edit in edits.items() if edit})
    for name, module in place.chain:
        vars(module).update(_attributes(module, name, place, count, gone))


def types_of(place: Place, count: int) -> list[Any] | None:
    """Read the type of every entry of a list.

    Args:
        place: of the list.
        count: its entries.

    Returns:
        the `layer_types` of the nearest configuration that has as many; None where none has.
    """
    found = [vars(c)["layer_types"] for c in _typing(place, count)]
    return [*found[0]] if found and place.stage is None else None


def retype_(model: nn.Module, place: Place, types: list[Any]) -> None:
    """Write the type of every entry of a list, to copies of its configurations.

    Args:
        model: the whole model.
        place: of the list.
        types: as many as the list has entries.
    """
    _edit_(model, {id(c): {"layer_types": [*types]} for c in _typing(place, len(types))})


def _typing(place: Place, count: int) -> list[Any]:
    around = [c for _, module in place.chain for c in _configs_of(module)]
    return [c for c in around if len(vars(c).get("layer_types") or ()) == count]


def _edit_(model: nn.Module, edits: Mapping[int, Mapping[str, Any]]) -> None:
    """Exchange configurations for edited copies, wherever a module refers to them."""
    copies = _copies(model, edits)
    for key, edit in edits.items():
        vars(copies[key]).update(edit)
    for module in model.modules():
        fields = vars(module)
        fields.update({k: copies[id(v)] for k, v in fields.items() if id(v) in copies})


def _configs_of(module: nn.Module) -> list[Any]:
    """List a module's configurations, the one that bears the name first."""
    values = {key: value for key, value in vars(module).items() if is_config(value)}
    return [values[key] for key in sorted(values, key=lambda key: key != "config")]


def _configs(model: nn.Module, place: Place) -> Iterator[tuple[Any, str]]:
    """Yield the configurations that may mention a list, each with its role.

    The `stack` one belongs to the list's own stack, the `whole` one to a model around it of the
    same kind, and any `other` one of that kind to a sibling, as the encoder's in T5.
    """
    around = [c for _, module in place.chain for c in _configs_of(module)]
    nearest = next((c for c in around if _mentions(c)), None)
    if nearest is None:
        return
    whole = [c for c in around if type(c) is type(nearest)][-1]
    seen: set[int] = set()
    for module in model.modules():
        for config in _configs_of(module):
            if type(config) is type(nearest) and id(config) not in seen:
                seen.add(id(config))
                own = "stack" if config is nearest else "other"
                yield config, "whole" if config is whole else own


def _mentions(config: Any) -> bool:
    return any(p.fullmatch(key) for key in vars(config) for p in (_GENERIC, _SIDED, _STAGED))


def _edited(
    config: Any, role: str, place: Place, count: int, gone: Collection[int]
) -> dict[str, Any]:
    """Work out what one configuration must say instead."""
    fields = vars(config)
    if place.stage is not None:
        return {} if role == "other" else _staged(fields, place.stage, count, gone)
    names = [
        key
        for key, value in fields.items()
        if _is_count(value, count) and _counts(fields, key, role, place.side)
    ]
    edits: dict[str, Any] = dict.fromkeys(names, count - len(gone))
    if edits and role != "other" and not (role == "whole" and fields.get("is_encoder_decoder")):
        edits |= _by_layer(fields, count, gone)
    return edits


def _is_count(value: object, count: int) -> bool:
    return type(value) is int and value == count


def _counts(fields: Mapping[str, Any], key: str, role: str, side: str) -> bool:
    """Tell whether a field counts the layers of a list on this side."""
    sided = _SIDED.fullmatch(key)
    if sided:
        return sided[2] == side
    if role == "other" or not _GENERIC.fullmatch(key):
        return False
    if role == "stack":
        return True
    if fields.get("is_encoder_decoder"):
        return side == "encoder"  # what is not said of the decoder is said of the encoder
    return not any((m := _SIDED.fullmatch(other)) and m[2] == side for other in fields)


def _staged(
    fields: Mapping[str, Any], stage: int, count: int, gone: Collection[int]
) -> dict[str, Any]:
    """Shorten one stage of a network that counts its blocks by stage."""
    edits = {}
    for key, value in fields.items():
        listed = _STAGED.fullmatch(key) and isinstance(value, (list, tuple)) and stage < len(value)
        if listed and value[stage] == count:
            changed = [*value[:stage], count - len(gone), *value[stage + 1 :]]
            edits[key] = type(value)(changed)
    return edits


def _by_layer(fields: Mapping[str, Any], count: int, gone: Collection[int]) -> dict[str, Any]:
    """Drop the gone layers from values by layer and from lists of layer numbers."""
    kept = [i for i in range(count) if i not in gone]
    edits: dict[str, Any] = {}
    for key, value in fields.items():
        if _APART.fullmatch(key):
            continue
        if key in _LEADING and type(value) is int:
            edits[key] = value - sum(i < value for i in gone)
        elif not isinstance(value, (list, tuple)) or not value:
            continue
        elif _NUMBERS.fullmatch(key):
            if all(type(v) is int and 0 <= v < count for v in value):
                edits[key] = type(value)(kept.index(v) for v in value if v not in gone)
        elif len(value) == count and (_BY_LAYER.fullmatch(key) or key in _ALSO_BY_LAYER):
            edits[key] = type(value)(value[i] for i in kept)
    if "attention_layers" in edits and "attention_types" in fields:  # GPT-Neo, in run lengths
        edits["attention_types"] = [[[*edits["attention_layers"]], 1]]
    return edits


def _copies(model: nn.Module, edits: Collection[int]) -> dict[int, Any]:
    """Copy the configurations to be edited, and those that hold one of them."""
    known = {id(c): c for module in model.modules() for c in _configs_of(module)}
    chosen = set(edits)
    while True:
        holders = {
            key
            for key, config in known.items()
            if key not in chosen and any(id(v) in chosen for v in vars(config).values())
        }
        if not holders:
            break
        chosen |= holders
    memo = {key: config for key, config in known.items() if key not in chosen}
    return {key: copy.deepcopy(known[key], memo) for key in chosen}


def _attributes(
    module: nn.Module, name: str, place: Place, count: int, gone: Collection[int]
) -> dict[str, int]:
    """Find a module's own counts of the list's entries."""
    if place.stage is not None:
        return {}
    inside = not place.side or place.side in name.split(".")
    return {
        key: count - len(gone)
        for key, value in vars(module).items()
        if _is_count(value, count)
        and (
            (inside and _GENERIC.fullmatch(key))
            or ((m := _SIDED.fullmatch(key)) and m[2] == place.side)
        )
    }
