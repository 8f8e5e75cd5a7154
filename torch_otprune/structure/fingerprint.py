"""What a model is made of, without its values: tensor names, shapes and types."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["fingerprint", "fingerprint_of", "layout"]


def layout(model: nn.Module) -> dict[str, str]:
    """Describe every tensor of a model's `state_dict`.

    Args:
        model: any module; only its tensors are looked at, never their values.

    Returns:
        name to shape and type, such as `{"conv.weight": "16x3x3x3:float32"}`, sorted by name.
    """
    state = model.state_dict()
    return {name: _describe(state[name]) for name in sorted(state)}


def fingerprint(model: nn.Module) -> str:
    """Hash the names, shapes and types of a model's tensors.

    Equal for two builds of one architecture, whatever their weights, device or seed.

    Args:
        model: any module.

    Returns:
        64 hexadecimal digits.
    """
    return fingerprint_of(layout(model))


def fingerprint_of(described: Mapping[str, str]) -> str:
    """Hash what `layout` returned.

    Args:
        described: name to shape and type.

    Returns:
        64 hexadecimal digits.
    """
    lines = sorted(f"{name}:{description}" for name, description in described.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):  # a module's `get_extra_state` may return anything
        return f"no tensor:{type(value).__name__}"
    shape = "x".join(map(str, value.shape)) or "scalar"
    return f"{shape}:{str(value.dtype).removeprefix('torch.')}"
