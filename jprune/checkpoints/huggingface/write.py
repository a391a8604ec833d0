"""Writes Hugging Face folders, parameter by parameter."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jprune.checkpoints import beside, writing
from jprune.checkpoints.dtypes import cast
from jprune.checkpoints.huggingface.files import INDEX
from jprune.checkpoints.model import Model
from jprune.checkpoints.source import Entry
from jprune.errors import JpruneError


class Writer:
    """Writes a Hugging Face folder, parameter by parameter, in any order; nothing is held back in memory.

    Config and tokenizer are written at once, so that whatever is wrong with them shows before the work, not after it.

    Args:
        folder: an empty folder.
        checkpoint: where config, tokenizer and the names of the tensors come from.
        dtypes: the dtype of each parameter in the file, by path; those not named keep the dtype they are stored in.
        max_shard_bytes: a file holds at most this much (or one tensor, if that is larger).
        reopen: the folder may hold what an earlier process wrote with the same arguments; see `keep`.
        follow: another process makes the folder and writes it; this one only reads.
        saturate: see `jprune.checkpoints.dtypes.cast`.

    Raises:
        JpruneError: the disk is full or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Model,
        dtypes: Mapping[str, Any] | None = None,
        *,
        max_shard_bytes: int | float = 5e9,
        reopen: bool = False,
        follow: bool = False,
        saturate: bool = False,
    ):
        self.folder = folder
        self._saturate = saturate
        self._entries = checkpoint.table
        self._dtypes = {
            path: np.dtype((dtypes or {}).get(path, leaf.dtype)) for path, leaf in checkpoint.shapes.items()
        }
        self._pending = dict.fromkeys(self._entries)
        stored: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for path, entry in self._entries.items():
            for key in entry.keys:
                if stored.setdefault(key, (entry.shape, self._dtypes[path]))[1] != self._dtypes[path]:
                    raise JpruneError(
                        f"{path}: cannot be {self._dtypes[path].name} in the file, where it shares {key} with "
                        f"parameters that are to be {stored[key][1].name}"
                    )
        sizes = {key: int(np.prod(shape)) * dtype.itemsize for key, (shape, dtype) in stored.items()}
        self._total = sum(sizes.values())
        with writing.explained(folder):
            if not follow:
                there = sum(file.stat().st_blocks * 512 for file in folder.glob("*.safetensors")) if reopen else 0
                writing.require_space(folder, self._total - there)
                beside.write(folder, checkpoint, self._dtypes)
            self._shards: dict[str, writing.SafetensorsFile] = {}
            plan = _shards(sizes, max_shard_bytes)
            for i, keys in enumerate(plan):
                name = f"model-{i + 1:05}-of-{len(plan):05}.safetensors" if len(plan) > 1 else "model.safetensors"
                tensors = {key: stored[key] for key in keys}
                file = writing.SafetensorsFile(folder / name, tensors, reopen=reopen, follow=follow)
                self._shards |= dict.fromkeys(keys, file)

    def write(self, path: str, array: np.ndarray | jax.Array) -> int:
        """Writes one parameter, in our layout, cast to its dtype in the file; returns the checksum of what is there.

        Each path is written once. Numbers that the dtype cannot hold are refused, or saturated.
        """
        if path not in self._pending:
            raise JpruneError(f"{path!r} is not a parameter of this model, or was written before")
        entry, values = self._entries[path], np.asarray(array)
        if values.shape != entry.path_shape:
            raise JpruneError(f"{path}: expected shape {entry.path_shape}, got {values.shape}")
        with writing.explained(self.folder):
            values = cast(values, self._dtypes[path], path, saturate=self._saturate)
            if _plain(entry):
                checksum = self._shards[entry.key].write(entry.key, entry.write(values))
            else:
                checksum = self._write_parts(entry, values)
        del self._pending[path]
        return checksum

    def _write_parts(self, entry: Entry, values: np.ndarray) -> int:
        """Writes a parameter that shares its tensor with others, or takes several tensors."""
        for index, key in enumerate(entry.keys):
            file = self._shards[key]
            tensor = np.empty(entry.shape, values.dtype) if entry.whole else file.read(key)
            entry.write_to(index, values, tensor)
            file.write(key, tensor)
        return writing.checksum(values)

    def read(self, path: str) -> np.ndarray:
        """A parameter that was written, in our layout."""
        entry = self._entries[path]
        return entry.read(*(self._shards[key].read(key) for key in entry.keys))

    def keep(self, checksums: Mapping[str, int]) -> bool:
        """Whether the files hold what an earlier process wrote, by its checksums; it is then not written again."""
        if not all(self._intact(path, checksum) for path, checksum in checksums.items()):
            return False
        for path in checksums:
            self._pending.pop(path, None)
        return True

    def _intact(self, path: str, checksum: int) -> bool:
        entry = self._entries[path]
        there = self._shards[entry.key].read(entry.key) if _plain(entry) else self.read(path)
        return writing.checksum(there) == checksum

    def sync(self, paths: Iterable[str]) -> None:
        """Returns when these parameters are on the disk, so that a power failure no longer takes them."""
        with writing.explained(self.folder):
            for file in dict.fromkeys(self._shards[key] for path in paths for key in self._entries[path].keys):
                file.sync()

    def close(self) -> None:
        """Writes the index.

        Raises:
            JpruneError: some parameters were never written.
        """
        if self._pending:
            raise JpruneError(f"{len(self._pending)} parameters were not written, first {next(iter(self._pending))}")
        if len({file.path for file in self._shards.values()}) > 1:
            weight_map = {key: file.path.name for key, file in sorted(self._shards.items())}
            with writing.explained(self.folder):
                writing.write_json(
                    self.folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map}
                )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def _plain(entry: Entry) -> bool:
    """Whether a parameter is one whole tensor."""
    return entry.whole and not entry.stacked


def _shards(sizes: Mapping[str, int], limit: int | float) -> list[list[str]]:
    """Keys in their order, cut wherever the next one would not fit."""
    shards: list[list[str]] = [[]]
    room = limit
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    return shards
