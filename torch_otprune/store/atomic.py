"""A directory that is written complete or not at all: aside, to the disk, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from torch_otprune.errors import LoadError

__all__ = ["put", "rescued"]

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_OLD = ".old"  # an earlier directory while it is being replaced where none can be exchanged
_BUSY = (errno.EBUSY, errno.EXDEV)
_OURS = re.compile(r".+\.(json|safetensors|md|txt|model|jinja)")
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)


def put(target: Path, write: Callable[[Path], None], *, what: str = "model") -> None:
    """Write a directory aside, see it on the disk, and put it in place of what is there.

    Whoever looks sees the old directory or the new one, wherever this process ends; on systems
    that cannot exchange two directories there is a moment with neither, which the next save or
    load of this place makes good.

    Args:
        target: where it shall be; what is there is deleted at the end.
        write: fills an empty directory that it is given.
        what: what is being saved, for the error.

    Raises:
        LoadError: if it cannot be written; what was there is there still.
    """
    try:
        rescued(target)
        _sweep(target)
        with _aside(target) as aside:
            write(aside)
            for path in (*sorted(aside.rglob("*")), aside):
                _sync(path)
            _swap(aside, target)
            _sync(target.parent)
    except OSError as error:
        fix = "pass a directory that you may write to, on a disk with room."
        if error.errno in _BUSY:
            fix = f"name a directory inside of it, such as {target / 'model'}."
        raise LoadError(
            f"the {what} cannot be saved: {(error.strerror or str(error)).rstrip('.')}.",
            where=str(target),
            fix=fix,
        ) from error


def rescued(target: Path) -> Path:
    """Put a directory back that a killed process had moved away to replace it.

    Args:
        target: where it belongs.

    Returns:
        the same.
    """
    # Another process may have been quicker, or nobody may look there: then an error follows.
    with contextlib.suppress(OSError):
        if not target.exists():
            next(iter(sorted(target.parent.glob(f".{target.name}.*{_OLD}"))), target).rename(target)
    return target


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Make an empty directory beside a place, held as long as this process lives."""
    aside, lock = _made(target)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _made(target: Path) -> tuple[Path, int | None]:
    while True:
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        aside.mkdir(parents=True)
        lock = _locked(aside, wait=True)
        if lock is None or aside.exists():
            return aside, lock
        os.close(lock)  # another process swept it away before it was held


def _sweep(target: Path) -> None:
    """Delete what killed processes left beside a place; what is held is being written."""
    for path in target.parent.glob(f".{target.name}.{'[0-9a-f]' * 8}"):
        lock = _locked(path, wait=False)
        if lock is not None:
            if all(_OURS.fullmatch(name) for name in os.listdir(path)):
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _locked(directory: Path, *, wait: bool) -> int | None:
    """Hold a directory; None where another process does, or nobody can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _sync(path: Path) -> None:
    """See to it that a file or a directory is on the disk, not on its way there."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(aside: Path, target: Path) -> None:
    """Put a finished directory in place; what was there lies aside then."""
    for _ in range(100):  # two processes may save to one place at once: the last one wins
        if target.exists() and _exchanged(aside, target):
            return
        if target.exists():
            _replace(aside, target)
            return
        try:
            aside.rename(target)
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
        else:
            return
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two directories in one step, where the system can."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOENT, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _replace(aside: Path, target: Path) -> None:
    old = aside.with_name(f"{aside.name}{_OLD}")
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
