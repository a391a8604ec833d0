"""Micro-batches of activations: in memory while there is room, in a memory-mapped file beyond that.

What is computed does not depend on where they lie. Of arrays in pieces on several devices each process keeps its own
pieces, in a file of its own. A file holds the arrays of every micro-batch at known places, so it
is written in any order and read without a copy; mapped pages belong to the file, and the system takes them back when it
needs them.
"""

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jprune import devices
from jprune.checkpoints import writing
from jprune.runs.background import Background

Arrays = tuple[Any, ...]
Specs = Sequence[jax.ShapeDtypeStruct]
_ALIGNMENT = 4096  # maps begin at pages; arrays that are aligned so are used without a copy


class Room:
    """Bytes of memory for activations, on the device and on the host; whoever takes some gives them back.

    On a CPU the device's memory is the host's, and only `device` counts.
    """

    def __init__(self, *, device: int, host: int):
        self._left = {"device": device, "host": host}

    @property
    def device(self) -> int:
        """Bytes that may still be taken on the device."""
        return self._left["device"]

    @property
    def left(self) -> int:
        """Bytes that may still be taken."""
        return sum(self._left.values())

    def take(self, nbytes: int) -> str | None:
        """Where there is room for so many bytes, "device" or "host"; they are taken. None: nowhere."""
        for place, left in self._left.items():
            if nbytes <= left:
                self._left[place] = left - nbytes
                return place
        return None

    def give_back(self, place: str, nbytes: int) -> None:
        """Bytes that are free again."""
        self._left[place] += nbytes


class ArrayFile:
    """Micro-batches of arrays in one file, or of each array the pieces that this process has.

    Args:
      path: the file; made when something is written to it.
      specs: shape and dtype of the arrays of every micro-batch.
    """

    def __init__(self, path: Path, specs: Sequence[Specs]):
        self.path = path
        self._specs = [tuple((s.shape, np.dtype(s.dtype)) for s in arrays) for arrays in specs]
        self._starts: list[list[int]] = []
        end = 0
        for arrays in self._specs:
            starts = []
            for shape, dtype in arrays:
                starts.append(end)
                end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            self._starts.append(starts)

    def write(self, j: int, arrays: Sequence[devices.Pieces]) -> list[int]:
        """Puts a micro-batch into its place, the pieces of an array one after the other; returns their checksums.

        Raises:
          JpruneError: the disk is full or cannot be written.
        """
        checksums = []
        with writing.explained(self.path.parent):
            self.path.touch()
            with self.path.open("r+b") as file:
                for start, pieces in zip(self._starts[j], arrays, strict=True):
                    file.seek(start)
                    for _, piece in sorted(pieces.items()):
                        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                        file.write(data.data)
                        checksums.append(writing.checksum(data))
        return checksums

    def read(self, j: int, shardings: Sequence[Any]) -> list[devices.Pieces]:
        """The pieces of a micro-batch that lie so, mapped.

        Raises:
          ValueError: the file is shorter than it should be.
        """
        return [
            self._pieces(start, dtype, devices.local_pieces(shape, sharding))
            for start, (shape, dtype), sharding in zip(self._starts[j], self._specs[j], shardings, strict=True)
        ]

    def checksums(self, j: int, shardings: Sequence[Any]) -> list[int]:
        """Of the pieces of a micro-batch as they are in the file."""
        return [writing.checksum(piece) for pieces in self.read(j, shardings) for piece in pieces.values()]

    def _pieces(self, start: int, dtype: np.dtype, places: Sequence[devices.Index]) -> devices.Pieces:
        pieces = {}
        for place in places:
            shape = tuple(end - begin for begin, end in place)
            mapped = np.memmap(self.path, np.uint8, "r", start, (math.prod(shape) * dtype.itemsize,))
            pieces[place] = mapped.view(dtype).reshape(shape)
            start += mapped.size
        return pieces


class Batches:
    """Micro-batches of arrays, put and taken by their number.

    Args:
      specs: shape and dtype of the arrays of every micro-batch; with their sharding if something is to be read that
        another process has written.
      room: memory that may be taken.
      path: of the file for those for which there is no room.
      behind: if given, those that stay in memory are written to the file too, by it.

    Attributes:
      saved: whether the file is to hold all of them, and to be there after them.
      seconds: that writing to the file has taken.
    """

    def __init__(self, specs: Sequence[Specs], room: Room, path: Path, behind: Background | None = None):
        self.specs = specs
        self.file = ArrayFile(path, specs)
        self.saved = behind is not None
        self.seconds = 0.0
        self._checksums: dict[int, list[int]] = {}
        self._room = room
        self._behind = behind
        self._kept: dict[int, tuple[str, int, Any]] = {}
        # Where arrays lie is known beforehand, or from those that are put.
        self._shardings = {j: [s.sharding for s in arrays] for j, arrays in enumerate(specs)}

    def __len__(self) -> int:
        return len(self.specs)

    def put(self, j: int, arrays: Arrays) -> None:
        """Stores a micro-batch; waits for the file only if there is no room in memory."""
        self._shardings[j] = [x.sharding for x in arrays]
        nbytes = sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards)
        place = self._room.take(nbytes)
        if place is None:
            self._write(j, arrays)
            return
        held = arrays if place == "device" else [devices.to_host(x) for x in arrays]
        self._kept[j] = place, nbytes, held
        if self._behind is not None:
            self._behind.submit(functools.partial(self._write, j, held), nbytes)

    def get(self, j: int) -> Arrays:
        """A micro-batch, on the devices."""
        place, _, held = self._kept.get(j, ("file", 0, None))
        if place == "device":
            return held
        pieces = held if place == "host" else self.file.read(j, self._shardings[j])
        where = zip(self.specs[j], self._shardings[j], strict=True)
        return tuple(
            devices.from_host(own, spec.shape, sharding) for own, (spec, sharding) in zip(pieces, where, strict=True)
        )

    def take(self, j: int) -> Arrays:
        """A micro-batch, for the last time."""
        arrays = self.get(j)
        if j in self._kept:
            place, nbytes, _ = self._kept.pop(j)
            self._room.give_back(place, nbytes)
        return arrays

    def intact(self, checksums: Sequence[Sequence[int]]) -> bool:
        """Whether the file holds what had these checksums; it is then taken as saved."""
        try:
            found = [self.file.checksums(j, self._shardings[j]) for j in range(len(self))]
        except (OSError, ValueError):  # gone, or shorter than it should be
            return False
        self.saved = found == checksums
        return self.saved

    def nbytes(self, j: int) -> int:
        """Size of a micro-batch, on all devices together."""
        return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in self.specs[j])

    def synced(self) -> list[list[int]]:
        """The checksums of all micro-batches, when all have been written and are on the disk."""
        start = time.monotonic()
        writing.sync(self.file.path)
        self.seconds += time.monotonic() - start
        return [self._checksums[j] for j in range(len(self))]

    def drop(self) -> None:
        """Forgets everything, and removes the file."""
        for place, nbytes, _ in self._kept.values():
            self._room.give_back(place, nbytes)
        self._kept.clear()
        self.file.path.unlink(missing_ok=True)

    def _write(self, j: int, held: Sequence[Any]) -> None:
        start = time.monotonic()
        pieces = [devices.to_host(x) if isinstance(x, jax.Array) else x for x in held]
        self._checksums[j] = self.file.write(j, pieces)
        self.seconds += time.monotonic() - start
