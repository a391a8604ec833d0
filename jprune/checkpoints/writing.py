"""Writing safetensors files tensor by tensor, in any order, holding none; and saying clearly why a write failed.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header with type, shape
and byte range of each tensor, then the data. The header needs no values, so it is written first and each tensor goes
straight to its place. (`safetensors.numpy.save_file` wants all tensors of a file at once, 5 GB of them.)

A file that must survive a power failure is synced before anything that relies on it is written: `replace` for small
files, `SafetensorsFile.sync` and `sync_folder` for results.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jprune import texts
from jprune.errors import JpruneError

_TYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TYPE_NAMES |= {"int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}


class SafetensorsFile:
    """A safetensors file whose tensors are known by shape and dtype and written one at a time.

    Args:
        path: the file to create.
        tensors: shape and dtype of each tensor by its key.
        reopen: the file may exist, from an earlier process that was to write the same tensors; what it holds stays.
        follow: another process makes the file and writes it; this one only reads.
        metadata: what the header says besides; by default what transformers asks for.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        *,
        reopen: bool = False,
        follow: bool = False,
        metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
    ):
        self.path = path
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, dict] = {"__metadata__": dict(metadata)}
        offset = 0
        # Wide types first, so that every tensor is aligned to its own item size.
        for key in sorted(self._tensors, key=lambda key: (-self._tensors[key][1].itemsize, key)):
            shape, dtype = self._tensors[key]
            end = offset + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": _TYPE_NAMES[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
            self._offsets[key] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        if follow:
            return
        if reopen:
            path.touch()
        with path.open("r+b" if reopen else "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._start + offset)  # longer or shorter: what was lost reads as zeros

    def write(self, key: str, values: np.ndarray) -> int:
        """Puts one tensor in its place and returns its checksum; shape and dtype must be those announced."""
        if (values.shape, values.dtype) != self._tensors[key]:
            raise TypeError(f"{key}: expected {self._tensors[key]}, got {(values.shape, values.dtype)}")
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with self.path.open("r+b") as file:
            file.seek(self._start + self._offsets[key])
            file.write(data.data)
        return checksum(data)

    def read(self, key: str) -> np.ndarray:
        """A tensor that was written."""
        shape, dtype = self._tensors[key]
        count = math.prod(shape)
        return np.fromfile(self.path, dtype, count, offset=self._start + self._offsets[key]).reshape(shape)

    def sync(self) -> None:
        """Returns when everything that was written is on the disk."""
        sync(self.path)


def checksum(data: np.ndarray) -> int:
    """CRC-32 of an array's bytes: finds damage, at several GB/s, but keeps out nobody who means it."""
    return zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


def replace(path: Path, content: bytes) -> None:
    """Writes a whole file so that at any moment, power failures included, there is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Returns when a folder and everything below it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns a failed write into a JpruneError that says what to do.

    Orbax reports a full disk as a ValueError with the system's words in it, so the words are looked at as well.
    """
    try:
        yield
    except JpruneError:
        raise
    except Exception as error:
        if disk_full(error):
            raise JpruneError(f"the disk of {folder} is full; free some space there or choose another place") from error
        if isinstance(error, OSError):
            raise JpruneError(f"{folder} cannot be written: {error}; check the path and its permissions") from error
        raise


def disk_full(error: BaseException) -> bool:
    """Whether an error says, in its number or in its words, that a disk is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def require_space(folder: Path, nbytes: int) -> None:
    """Refuses to begin a checkpoint that the disk cannot hold: better now than after hours of pruning."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise JpruneError(
            f"the checkpoint needs {nbytes / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB free; "
            "free some space there, choose another place, or write a smaller dtype"
        )


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file, with errors that name the file."""
    try:
        content = texts.json_of(path.read_bytes(), path.name)
    except FileNotFoundError:
        raise JpruneError(f"{path.parent}: no {path.name} there; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise JpruneError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise JpruneError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one JSON object, readably."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files may be no text; this is JSON's escape
