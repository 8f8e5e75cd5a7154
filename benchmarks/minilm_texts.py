"""English prose out of Python sources, and which of it is read for what."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

__all__ = ["docstrings", "split"]

SHORTEST, LONGEST = 40, 1000  # in characters
VALIDATION, TEST, MORE = 128, 600, 6144


def docstrings(root: Path) -> list[str]:
    """Read English prose out of Python sources, which are parsed and never run.

    Args:
        root: folder of the sources; tests and installed packages in it are left out.

    Returns:
        first paragraphs of docstrings, each once, in the order of paths and lines.
    """
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if not skipped & set(path.relative_to(root).parts):
            found |= dict.fromkeys(_paragraphs(path))
    return list(found)


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # files that are templates, or broken on purpose
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            words = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
            if SHORTEST <= len(words) <= LONGEST:
                yield words


def split(
    texts: Sequence[str], seeds: int, *, samples: int, others: Sequence[str] = ()
) -> dict[tuple[str, int], list[str]]:
    """Draw test texts once, and calibration and validation texts per seed from the rest.

    Args:
        texts: all of them.
        seeds: how many draws.
        samples: how many calibration texts.
        others: texts that only gradient steps read, with what is left.

    Returns:
        texts by part and seed; no text is in two parts of one seed.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    parts, rest = {("test", 0): [texts[i] for i in order[:TEST]]}, order[TEST:]
    taken = set(texts)
    others = list(dict.fromkeys(text for text in others if text not in taken))
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1 + seed)
        drawn = [texts[rest[i]] for i in torch.randperm(len(rest), generator=generator).tolist()]
        parts["calibration", seed] = drawn[:samples]
        parts["validation", seed] = drawn[samples : samples + VALIDATION]
        left = drawn[samples + VALIDATION :]
        mixed = torch.randperm(len(others), generator=generator).tolist()
        parts["more", seed] = (left + [others[i] for i in mixed])[:MORE]
    return parts
