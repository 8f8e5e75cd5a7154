"""Doors to other libraries: each file imports its own, and only when it is used."""

from __future__ import annotations
