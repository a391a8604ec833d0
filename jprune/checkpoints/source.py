"""What a file format must offer to make a checkpoint: named tensors, a config, and the files beside them.

Nothing here holds weights. A `StoredTensor` knows its shape and dtype from the file's header, and reads its values when
asked.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from jprune.models.blocks import InBlocks
from jprune.models.kernels import Kernel

FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Entry(Protocol):
    """Where a parameter is stored, and the two directions; `jprune.models.families.Entry` is one."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the tensors that store it."""
        ...

    @property
    def key(self) -> str:
        """The first of them."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each stored tensor."""
        ...

    @property
    def path_shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        ...

    @property
    def whole(self) -> bool:
        """Whether no other parameter is in these tensors."""
        ...

    @property
    def stacked(self) -> bool:
        """Whether it is made of several tensors."""
        ...

    def read(self, *stored: np.ndarray) -> np.ndarray:
        """The parameter, out of its stored tensors."""
        ...

    def read_in_turn(self, stored: Iterable[np.ndarray]) -> np.ndarray:
        """The same, of tensors that come one by one."""
        ...

    def write(self, parameter: np.ndarray) -> np.ndarray:
        """The stored tensor of a parameter that is one."""
        ...

    def write_to(self, index: int, parameter: np.ndarray, out: np.ndarray) -> None:
        """Fills its part of the stored tensor `keys[index]`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a file: its shape and dtype, the file it lies in (for messages), and how to read it.

    Files hold tensors that no model needs, mask buffers for instance; what stands in the way of reading one is its
    `problem`, and matters only if it is needed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None  # some rows, where that takes less than all
    problem: str | None = None  # why it cannot be read
    packed: Callable[[], Kernel] | None = None  # where it is a packed kernel: how to read it as that
    stored_bytes: int | None = None  # what it takes in the file, where that is not what its shape and dtype say

    @property
    def nbytes(self) -> int:
        """What its values take once they are read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows of it."""
        return self.read()[start:stop] if self.read_rows is None else self.read_rows(start, stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened set of files: the config, the tensors, and lazily everything that travels with a model."""

    config: dict  # config.json, as read or as rebuilt
    tensors: Mapping[str, StoredTensor]
    layout: str  # "hugging_face": keys and shapes as Hugging Face has them; "jprune": our paths and shapes
    side_files: Callable[[], dict[str, bytes]]  # tokenizer, generation config, licence: {file name: content}
    identity: Callable[[], str]  # see `identify`
    # Where reading many tensors at once is much cheaper than one by one: {key: values} of the keys given.
    read_together: Callable[[list[str]], dict[str, np.ndarray]] | None = None
    notices: tuple[str, ...] = ()  # what a user should know of what was opened
    model: InBlocks | None = None  # of a model that is not native; its tensors are by path and in its own layout
    table: Mapping[str, Entry] = dataclasses.field(default_factory=dict)  # and where they are stored


def joined(stored: Sequence[StoredTensor], entry: Entry) -> StoredTensor:
    """A parameter in our layout, out of the tensors that store it."""
    share = math.prod(entry.path_shape) / sum(math.prod(tensor.shape) for tensor in stored)  # of fused tensors a part
    quantised = all(tensor.stored_bytes is not None for tensor in stored)
    dtype = functools.reduce(np.promote_types, (tensor.dtype for tensor in stored))
    return StoredTensor(
        shape=entry.path_shape,
        dtype=dtype,
        where=stored[0].where,
        read=lambda: entry.read_in_turn(tensor.read().astype(dtype, copy=False) for tensor in stored),
        stored_bytes=round(share * sum(tensor.stored_bytes or 0 for tensor in stored)) if quantised else None,
    )


def reason(error: Exception) -> str:
    """What another library's error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def identify(*files: Path) -> str:
    """A hash that tells these files from others without reading them whole.

    Per file: its name, its size, its first 64 KiB (where safetensors and GGUF keep their headers) and 64 pages spread
    over the rest. Two fine-tunes of one model differ nearly everywhere, so they differ here; a changed byte may not.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            for i in range(64):
                file.seek(size * i // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()
