"""The header of a GGUF file: metadata and tensor directory, checked against the size of the file.

GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian:
magic, version, counts, then (key, type, value) pairs, then (name, dims, type, offset) of each tensor, then data.

Why not `gguf.GGUFReader`: it makes an array for every string of the vocabulary (2.4 s for SmolLM2, here 0.1 s), and a
damaged length makes it loop for hours or raise from deep inside. The block formats are the `gguf` package's.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

from jprune.errors import JpruneError
from jprune.packages import require

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class _Damaged(Exception):
    """Something in the header cannot be true."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor lies: GGUF's name, NumPy's axis order (GGUF lists the fastest axis first), type, byte range."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Everything before the data, with the file kept mapped for later reads."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    data: memoryview


def read(path: Path) -> Header:
    """Reads the header of a GGUF file and checks that every tensor lies inside the file.

    Raises:
        JpruneError: not a GGUF file, a version or byte order that we do not read, or a truncated or damaged file.
    """
    require("gguf")
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
        raise JpruneError(f"{path}: cannot be read as GGUF ({error}); download it again") from error
    if bytes(data[:4]) != b"GGUF":
        raise JpruneError(
            f"{path}: not a GGUF file (it starts with {bytes(data[:4])!r}, a GGUF file starts with b'GGUF')"
        )
    try:
        metadata, tensors = _parse(_Cursor(data))
    except (_Damaged, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise JpruneError(
            f"{path}: the GGUF file is truncated or damaged ({error}; it has {len(data)} bytes); download it again"
        ) from error
    return Header(path=path, metadata=metadata, tensors=tensors, data=data)


class _Cursor:
    """Reads typed values one after the other, and never past the end."""

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 0

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self.data) - self.at:
            raise _Damaged(f"{nbytes} bytes wanted at byte {self.at}")
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return str(self.take(self.scalar("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _Damaged(f"unknown metadata type {kind} at byte {self.at}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item])
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * size)))
        if item != _STRING:
            raise _Damaged(f"an array of metadata type {item} at byte {self.at}")
        return [self.string() for _ in range(count)]


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        order = ": it looks big-endian" if version & 0xFFFF == 0 else ""
        raise _Damaged(f"version {version}{order}; versions 2 and 3 in little-endian order can be read")
    tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))

    directory = []
    for _ in range(tensor_count):
        name, dims = cursor.string(), cursor.scalar("I")
        if dims > _MAX_DIMS:
            raise _Damaged(f"tensor {name!r} with {dims} axes")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(dims)]))
        directory.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Damaged(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in directory:
        nbytes = _nbytes(name, shape, kind)
        if start + offset + nbytes > len(cursor.data):
            raise _Damaged(f"tensor {name!r} ends at byte {start + offset + nbytes}")
        if name in tensors:
            raise _Damaged(f"tensor {name!r} is listed twice")
        tensors[name] = Tensor(name=name, shape=shape, type=kind, begin=start + offset, nbytes=nbytes)
    return metadata, tensors


def _nbytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _Damaged(f"tensor {name!r} has the unknown type {kind}") from None
    if shape and shape[-1] % block:
        raise _Damaged(f"rows of {shape[-1]} values in tensor {name!r}, stored in blocks of {block}")
    return math.prod(shape) // block * block_bytes
