"""A shelf of the zoo."""

from __future__ import annotations

from tests.zoo.entry import Entry

ENTRIES: dict[str, Entry] = {}
