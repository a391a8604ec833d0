"""Writing safetensors files tensor by tensor, in any order, holding none; and saying clearly why a write failed.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header with type, shape
and byte range of each tensor, then the data. The header needs no values, so it is written first and each tensor goes
straight to its place. (`safetensors.numpy.save_file` wants all tensors of a file at once, 5 GB of them.)
"""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jprune.errors import JpruneError

_TYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SafetensorsFile:
    """A safetensors file whose tensors are known by shape and dtype and written one at a time.

    Args:
        path: the file to create.
        tensors: shape and dtype of each tensor by its key.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self.path = path
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
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
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._start + offset)

    def write(self, key: str, values: np.ndarray) -> None:
        """Puts one tensor in its place; its shape and dtype must be those announced."""
        if (values.shape, values.dtype) != self._tensors[key]:
            raise TypeError(f"{key}: expected {self._tensors[key]}, got {(values.shape, values.dtype)}")
        with self.path.open("r+b") as file:
            file.seek(self._start + self._offsets[key])
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


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
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise JpruneError(f"the disk of {folder} is full; free some space there or choose another place") from error
        if isinstance(error, OSError):
            raise JpruneError(f"{folder} cannot be written: {error}; check the path and its permissions") from error
        raise


def require_space(folder: Path, nbytes: int) -> None:
    """Refuses to begin a checkpoint that the disk cannot hold: better now than after hours of pruning."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise JpruneError(
            f"the checkpoint needs {nbytes / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB free; "
            "free some space there, choose another place, or write a smaller dtype"
        )
