"""All shelves of the zoo."""

from __future__ import annotations

from importlib import import_module

from tests.zoo.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: dict[str, Entry] = {}
for _shelf in ("patterns", "recurrent", "convex", "vision", "transformers_text", "transformers_other"):
    ENTRIES |= import_module(f"tests.zoo.{_shelf}").ENTRIES
