"""A saved model, read again for a command."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torch_otprune.cli import names
from torch_otprune.errors import LoadError
from torch_otprune.store import load
from torch_otprune.store.files import PLAN

__all__ = ["reload", "saved_in"]


def saved_in(directory: Path) -> Path:
    """Find the saved model in what `apply` or `otp.save` wrote.

    Args:
        directory: of either.

    Returns:
        where its plan lies, or would.
    """
    inner = directory / "model"
    return inner if (inner / PLAN).is_file() else directory


def reload(root: Path, factory: str, *, strict: bool) -> nn.Module:
    """Load a saved model.

    Args:
        root: the directory.
        factory: name of what builds the dense model.
        strict: as for `otp.load`.

    Returns:
        the model.

    Raises:
        LoadError: as `otp.load` does, in the words of a shell.
    """
    try:
        return load(root, factory=lambda: names.model(factory), strict=strict)
    except LoadError as error:
        fix = error.fix.replace("strict=False", "--no-strict")
        raise LoadError(error.problem, where=error.where, fix=fix) from error
