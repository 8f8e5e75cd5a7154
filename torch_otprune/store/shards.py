"""Tensors in files of a limited size, and back: one tensor at a time, every byte accounted for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from torch_otprune.errors import LoadError
from torch_otprune.store.files import INDEX, WEIGHTS, Mark, Stored, damaged, digest
from torch_otprune.store.tensors import Header, read, read_header, size_of, write

__all__ = ["bytes_of", "check_shards", "tensors_of", "write_shards"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_AGAIN = "copy the directory again, all its files together."


def bytes_of(size: str | int, *, where: str) -> int:
    """Read a size.

    Args:
        size: bytes, or such as "1GB", "500 MB", "2GiB".
        where: what to name in an error.

    Returns:
        bytes.

    Raises:
        LoadError: if it is none, or not positive.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    total = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if found is not None:
        number, unit, binary = found.groups()
        power = "KMGT".index(unit.upper()) + 1 if unit else 0
        total = int(float(number) * (1024**power if binary else _UNITS[unit.upper()]))
    if total < 1:
        raise LoadError(
            f"the size of a file is {size!r}.",
            where=where,
            fix="give bytes, or a size such as '1GB' or '500MB'.",
        )
    return total


def write_shards(root: Path, tensors: Mapping[str, Tensor], limit: int) -> dict[str, Mark]:
    """Write tensors into one file, or into several with an index that other tools read too.

    Args:
        root: a directory.
        tensors: each goes into one file whole, however large.
        limit: bytes of tensors per file.

    Returns:
        what was written.

    Raises:
        OSError: if the disk is full, or a file cannot be written.
    """
    shards = _shared_out(tensors, limit)
    many = len(shards)
    names = [f"model-{i:05}-of-{many:05}.safetensors" for i in range(1, many + 1)]
    names = names if many > 1 else [WEIGHTS]
    marks = {}
    for file, keys in zip(names, shards, strict=True):
        sha256 = write(root / file, {key: tensors[key] for key in keys})
        marks[file] = Mark(sha256=sha256, bytes=(root / file).stat().st_size)
    if many > 1:
        total = sum(size_of(tensor) for tensor in tensors.values())
        where = {key: file for file, keys in zip(names, shards, strict=True) for key in keys}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        text = (json.dumps(content, indent=2) + "\n").encode()
        (root / INDEX).write_bytes(text)
        marks[INDEX] = Mark(sha256=hashlib.sha256(text).hexdigest(), bytes=len(text))
    return marks


def _shared_out(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        size = size_of(tensor)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def check_shards(root: Path, stored: Stored) -> dict[str, Header]:
    """Read what the files of a directory say they hold, before any tensor is read.

    Args:
        root: the directory.
        stored: its page.

    Returns:
        file to header.

    Raises:
        LoadError: naming the first file that is cut short, exchanged or from elsewhere.
    """
    found: dict[str, Header] = {}
    for file, mark in stored.files.items():
        if (size := (root / file).stat().st_size) != mark.bytes:
            _refuse(root, file, stored, f"it has {size:,} bytes of {mark.bytes:,}")
        try:
            if file.endswith(".safetensors"):
                found[file] = read_header(root / file)
            elif digest(root / file) != mark.sha256:
                _refuse(root, file, stored, "the hash differs")
        except ValueError as error:
            _refuse(root, file, stored, str(error))
        except OSError as error:
            _unreadable(root, file, error)
    return found


def _unreadable(root: Path, file: str, error: OSError) -> NoReturn:
    reason = f"its {file} cannot be read: {error.strerror or error}"
    fix = "pass a directory that you may read, on a disk that works."
    raise damaged(root, reason, fix) from error


def tensors_of(
    root: Path, stored: Stored, headers: Mapping[str, Header]
) -> Iterator[tuple[str, Tensor]]:
    """Read every tensor of a directory, file by file.

    Args:
        root: the directory.
        stored: its page.
        headers: what `check_shards` returned.

    Yields:
        stored name and tensor, in memory of its own.

    Raises:
        LoadError: naming a file that is not the one that was saved, behind its last tensor.
    """
    for file, header in headers.items():
        found = hashlib.sha256()
        try:
            yield from read(root / file, header, found)
        except ValueError as error:
            _refuse(root, file, stored, str(error))
        except OSError as error:
            _unreadable(root, file, error)
        if found.hexdigest() != stored.files[file].sha256:
            _refuse(root, file, stored, "the hash differs")


def _refuse(root: Path, file: str, stored: Stored, reason: str) -> NoReturn:
    """Say what is wrong with a file: exchanged for another of the same save, or not its own."""
    actual = digest(root / file)
    for other, mark in stored.files.items():
        if other != file and mark.sha256 == actual:
            raise damaged(root, f"its {file} holds what {other} should hold", _AGAIN)
    reason = f"its {file} is truncated or from another save: {reason}"
    raise damaged(root, reason, _AGAIN)
