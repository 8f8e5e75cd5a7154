"""What a user would call a layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn

from torch_otprune.structure.graph import Block

__all__ = ["levelled", "listed"]


def levelled(model: nn.Module, blocks: list[Block]) -> list[Block]:
    """Tell layers, which a user would name, from what is inside them or around several.

    Args:
        model: any module; it is read, never written.
        blocks: all that can go.

    Returns:
        the same, with their level.
    """
    # Layers are the outermost entries of a list that holds at least two of them; where there
    # are no lists, the innermost blocks.
    whole = [b.name for b in blocks if b.kind == "block"]
    lists = Counter(n.rpartition(".")[0] for n in whole if listed(model, n))
    entries = [n for n in whole if lists[n.rpartition(".")[0]] > 1]
    layers = {n for n in entries if not any(_below(n, other) for other in entries)}
    kinds = {type(model.get_submodule(n)) for n in layers} - {nn.Sequential}
    around = [n for n, m in model.named_modules() if n in layers or type(m) in kinds]
    apart = [n for n in whole if not any(_below(n, a) or _below(a, n) for a in around)]
    layers |= {n for n in apart if not any(_below(other, n) for other in apart)}
    return [replace(b, level="layer") if b.name in layers else b for b in blocks]


def _below(path: str, container: str) -> bool:
    return path.startswith(f"{container}.")


def listed(model: nn.Module, path: str) -> bool:
    """Tell whether a module is an entry of a list."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(parent, (nn.ModuleList, nn.Sequential))
