"""The safetensors format, one tensor at a time: memory is never asked for a second model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["KINDS", "Header", "read", "read_header", "size_of", "storable", "write"]

_HEADER = 100_000_000  # bytes; what the format allows
_PIECE = 1 << 24  # bytes

KINDS: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    # The format has no name for it: pairs of numbers, one axis more.
    torch.complex128: "F64",
}  # fmt: skip
"""What the format calls each type."""

_TYPES = {name: dtype for dtype, name in KINDS.items() if dtype is not torch.complex128}

Header = dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]
"""Name to type, shape, first byte and the byte behind the last, counted from the data's start."""


def storable(value: object) -> str | None:
    """Tell why a value is no tensor that the format can hold.

    Args:
        value: an entry of a `state_dict`.

    Returns:
        a clause; None where it can be stored.
    """
    if not isinstance(value, Tensor):
        return f"an extra state of type {type(value).__name__}"
    if is_traceable_wrapper_subclass(value):
        return f"a {type(value).__name__}, made of several tensors"
    if value.is_meta or value.is_quantized or value.layout is not torch.strided:
        return f"a {'meta' if value.is_meta else value.dtype} tensor of layout {value.layout}"
    return None if value.dtype in KINDS else f"of type {value.dtype}"


def size_of(tensor: Tensor) -> int:
    """Count the bytes that a tensor takes in a file."""
    return tensor.numel() * tensor.element_size()


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file. No more than one tensor is copied at any time.

    Args:
        path: a new file.
        tensors: what goes there, in any arrangement, on any device.

    Returns:
        SHA-256 of the file.

    Raises:
        OSError: if the disk is full, or the file cannot be written.
    """
    # Large items first, so that every tensor starts at a multiple of its item's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    found = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _pieces(tensors, order):
            found.update(piece)
            file.write(piece)
    return found.hexdigest()


def _pieces(tensors: Mapping[str, Tensor], order: list[str]) -> Iterator[bytes | memoryview]:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    described: dict[str, object] = dict(header)
    for name in order:
        tensor, begin = tensors[name], end
        end += size_of(tensor)
        pair = [2] if tensor.dtype is torch.complex128 else []
        shape = [*tensor.shape, *pair]
        described[name] = {
            "dtype": KINDS[tensor.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        if tensors[name].numel():
            yield _bytes(tensors[name])


def _bytes(tensor: Tensor) -> memoryview:
    """Look at a tensor as bytes: row-major, on the CPU, conjugates and signs written out."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return _memory(plain.reshape(-1))


def _memory(row: Tensor) -> memoryview:
    """Look at a row of numbers where it lies, in bytes."""
    raw: Any = row.view(torch.uint8).numpy()
    return memoryview(raw)


def read_header(path: Path) -> Header:
    """Read what a file says it holds.

    Args:
        path: the file.

    Returns:
        its tensors, in the order of their bytes.

    Raises:
        ValueError: if the file is cut short or no such file; said in a clause.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER, size - 8):
            raise ValueError("it ends inside its header")
        try:
            header = _parsed(json.loads(file.read(length)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("its header cannot be read") from error
    end = 8 + length
    for name, (dtype, shape, first, last) in header.items():
        if first != end - 8 - length or last - first != _count(shape) * dtype.itemsize:
            raise ValueError(f"its header contradicts itself at '{name}'")
        end += last - first
    if end != size:
        raise ValueError(f"it has {size:,} bytes where its header promises {end:,}")
    return header


def _parsed(content: Mapping[str, dict[str, list[int]]]) -> Header:
    found = {
        name: (_TYPES[str(told["dtype"])], tuple(told["shape"]), *told["data_offsets"])
        for name, told in content.items()
        if name != "__metadata__"
    }
    return dict(sorted(found.items(), key=lambda item: item[1][2:]))  # type: ignore[arg-type]


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        if type(size) is not int or size < 0:
            return -1
        total *= size
    return total


def read(path: Path, header: Header, found: hashlib._Hash) -> Iterator[tuple[str, Tensor]]:
    """Read a file's tensors one after the other, each into memory of its own.

    Args:
        path: the file.
        header: what `read_header` returned.
        found: takes up every byte of the file.

    Yields:
        name and tensor; the hash is complete only after the last.

    Raises:
        ValueError: if the file ends too early.
    """
    with path.open("rb") as file:
        start = file.read(8)
        found.update(start)
        found.update(file.read(int.from_bytes(start, "little")))
        for name, (dtype, shape, _, _) in header.items():
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            if tensor.numel():
                _fill_(tensor, file, found)
            yield name, tensor


def _fill_(tensor: Tensor, file: BinaryIO, found: hashlib._Hash) -> None:
    pairs = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    room = _memory(pairs.view(-1))
    for begin in range(0, len(room), _PIECE):
        piece = room[begin : begin + _PIECE]
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise ValueError("it ends too early")
        found.update(piece)
