"""Files a command reads and writes: objections come before the work, not after it."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from torch_otprune.errors import OTPruneError
from torch_otprune.plan import Plan
from torch_otprune.store.files import PLAN, format_of, mine

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


def check_file(path: Path, *, option: str = "--out", what: str = "plan.json") -> None:
    """Object to a file that cannot be written.

    Args:
        path: where it shall go.
        option: that names it.
        what: how it might be called.

    Raises:
        OTPruneError: if that is a directory, or lies below a file.
    """
    if path.is_dir():
        raise OTPruneError(
            f"the {Path(what).stem} cannot be written: this is a directory.",
            where=f"{option} {path}",
            fix=f"name a file, such as {path / what}.",
        )
    _check_above(path, option)


def write(path: Path, content: str | bytes, *, option: str = "--out") -> None:
    """Write a file, and the directories above it.

    Args:
        path: the file.
        content: text, or a picture.
        option: that names it.

    Raises:
        OTPruneError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        _refuse(path, error.strerror or str(error), option)


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
    if inside and not (all(map(mine, inside)) and format_of(model / PLAN) == "torch_otprune"):
        _refuse(model, "it holds something else than a saved model")


def _check_above(path: Path, option: str = "--out") -> None:
    above = next((p for p in path.absolute().parents if p.exists()), path)
    if not above.is_dir():
        _refuse(path, f"{above} is a file", option)


def _refuse(path: Path, reason: str, option: str = "--out") -> NoReturn:
    raise OTPruneError(
        f"nothing can be written there: {reason.rstrip('.')}.",
        where=f"{option} {path}",
        fix="name a new place, or one that this command wrote.",
    )
