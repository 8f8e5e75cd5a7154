"""Configurations that compare their fields with one another, and refuse some values."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["Strict", "refused"]


@runtime_checkable
class Strict(Protocol):
    """A configuration that checks itself."""

    def validate(self) -> None:
        """Raise where its fields contradict each other."""


def refused(config: Any) -> bool:
    """Tell whether a configuration contradicts itself, so that it could not be written.

    Args:
        config: of any kind; what does not check itself refuses nothing.

    Returns:
        whether it does.
    """
    try:
        if isinstance(config, Strict):
            config.validate()
    except Exception:  # noqa: BLE001  # whatever it raises: it will do so again when written
        return True
    return False
