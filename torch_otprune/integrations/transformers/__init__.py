"""Transformers: pruned models come back with `from_pretrained`, and go out with a model card."""

from __future__ import annotations

from torch_otprune.integrations.transformers.saving import card, save_pretrained

__all__ = ["card", "save_pretrained"]
