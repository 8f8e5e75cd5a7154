"""Files a command reads and writes: objections come before the work, not after it."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from torch_otprune.errors import OTPruneError
from torch_otprune.plan import Plan
from torch_otprune.store.files import PLAN, WEIGHTS, format_of

__all__ = ["check_directory", "check_file", "read_plan", "write"]


def read_plan(path: Path) -> Plan:
    """Read a plan that `otprune plan --out` wrote.

    Args:
        path: the file.

    Returns:
        the plan.

    Raises:
        OTPruneError: if the file cannot be read; `PlanError` if it holds no plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OTPruneError(
            f"the plan cannot be read: {reason}.",
            where=f"--plan {path}",
            fix="pass the file that `otprune plan --out` wrote.",
        ) from error
    return Plan.from_json(text)


def check_file(path: Path) -> None:
    """Object to a file that cannot be written.

    Args:
        path: where the plan shall go.

    Raises:
        OTPruneError: if that is a directory, or lies below a file.
    """
    if path.is_dir():
        raise OTPruneError(
            "the plan cannot be written: this is a directory.",
            where=f"--out {path}",
            fix=f"name a file, such as {path / 'plan.json'}.",
        )
    _check_above(path)


def write(path: Path, text: str) -> None:
    """Write a text file, and the directories above it.

    Args:
        path: the file.
        text: its content.

    Raises:
        OTPruneError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        _refuse(path, error.strerror or str(error))


def check_directory(out: Path, *, report: str = "report") -> None:
    """Object to a directory that the saved model or the report could not go to.

    Args:
        out: the directory.
        report: where in it the report goes.

    Raises:
        OTPruneError: if something else is there.
    """
    model = out / "model"
    for path in (out, out / report, model):
        if path.exists() and not path.is_dir():
            _refuse(path, "it is a file")
    _check_above(out)
    inside = {path.name for path in model.iterdir()} if model.exists() else set()
    if inside and not (inside <= {PLAN, WEIGHTS} and format_of(model / PLAN) == "torch_otprune"):
        _refuse(model, "it holds something else than a saved model")


def _check_above(path: Path) -> None:
    above = next((p for p in path.absolute().parents if p.exists()), path)
    if not above.is_dir():
        _refuse(path, f"{above} is a file")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise OTPruneError(
        f"nothing can be written there: {reason.rstrip('.')}.",
        where=f"--out {path}",
        fix="name a new place, or one that this command wrote.",
    )
