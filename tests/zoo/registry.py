"""All shelves of the zoo."""

from __future__ import annotations

from importlib import import_module

from tests.zoo.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: dict[str, Entry] = {}
_SHELVES = ("patterns", "recurrent", "convex", "vision", "transformers_text", "transformers_other")
for _shelf in _SHELVES:
    ENTRIES |= import_module(f"tests.zoo.{_shelf}").ENTRIES
