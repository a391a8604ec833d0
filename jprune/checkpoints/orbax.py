"""Orbax checkpoints (v1 API): a folder with the parameters as an Orbax pytree, and config and tokenizer beside them.

    config.json, tokenizer.json, ...     as in a Hugging Face folder
    jprune.json                          the record
    params/                              the pytree, in our layout: nested dicts of arrays

Orbax's v1 API is young; everything that touches it is here.
"""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jprune import trees
from jprune.checkpoints import beside, record, writing
from jprune.checkpoints.dtypes import cast
from jprune.checkpoints.inside import checked
from jprune.checkpoints.model import Model
from jprune.checkpoints.source import Source, StoredTensor, identify, reason
from jprune.errors import JpruneError
from jprune.packages import require

PART_BYTES = 2**28
"""Parameters are saved in parts of at least this size, which are in memory at one time."""
_PARAMS = "params"
_MARK = "_CHECKPOINT_METADATA"  # a file that Orbax puts into every checkpoint


def is_orbax(folder: Path) -> bool:
    """Whether a folder is, or contains, an Orbax checkpoint."""
    return (folder / _PARAMS / _MARK).exists() or (folder / _MARK).exists()


def discard(folder: Path) -> None:
    """Removes an Orbax checkpoint that an earlier process left in a folder, finished or not."""
    for left in folder.glob(f"{_PARAMS}*"):
        shutil.rmtree(left)


def save(folder: Path, checkpoint: Model, params: Mapping[str, Any], contents: Mapping[str, Any] | None = None) -> None:
    """Writes parameters and the config and tokenizer of `checkpoint` into an empty folder.

    Args:
        folder: an empty folder.
        checkpoint: where config and tokenizer come from, and which parameters there must be.
        params: nested dicts of arrays, NumPy's or JAX's, whatever their dtypes.
        contents: the record (`jprune.checkpoints.record`), written as well where given.

    Raises:
        JpruneError: parameters do not fit the model, or the disk is full.
    """
    require("orbax.checkpoint")
    from orbax.checkpoint import v1 as ocp

    leaves = trees.flatten(params)
    for path, leaf in checkpoint.shapes.items():
        if path not in leaves or leaves[path].shape != leaf.shape:
            found = f"shape {leaves[path].shape}" if path in leaves else "nothing"
            raise JpruneError(f"{path}: expected shape {leaf.shape}, got {found}")
    if unknown := [path for path in leaves if path not in checkpoint.shapes]:
        raise JpruneError(f"{unknown[0]!r} is not a parameter of this model")
    with writing.explained(folder):
        writing.require_space(folder, sum(leaf.nbytes for leaf in leaves.values()))
        beside.write(folder, checkpoint, {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()})
        ocp.save((folder / _PARAMS).resolve(), trees.unflatten(leaves))
        if contents is not None:
            record.write(folder, contents)


class Writer:
    """Takes parameters one by one, in any order, as `huggingface.Writer` does; a part of them is in memory at a time.

    Args:
        folder: where the checkpoint goes; an Orbax checkpoint that an earlier process left there unfinished is removed.
        checkpoint: where config and tokenizer come from, and which parameters there must be.
        dtypes: the dtype of each parameter in the file, by path; those not named keep what they come in.
        saturate: see `jprune.checkpoints.dtypes.cast`.

    Raises:
        JpruneError: the disk is full or cannot be written.
    """

    def __init__(
        self, folder: Path, checkpoint: Model, dtypes: Mapping[str, Any] | None = None, *, saturate: bool = False
    ):
        require("orbax.checkpoint")
        self._saturate = saturate
        self._folder, self._checkpoint, self._dtypes = folder, checkpoint, dtypes or {}
        self._pending = dict(checkpoint.shapes)
        self._written: dict[str, np.dtype] = {}
        self._held: dict[str, np.ndarray] = {}
        with writing.explained(folder):
            discard(folder)
            writing.require_space(folder, sum(leaf.size * leaf.dtype.itemsize for leaf in checkpoint.shapes.values()))

    def write(self, path: str, array: np.ndarray | jax.Array) -> None:
        """Writes one parameter, in our layout, or holds it until there are enough for a part."""
        if path not in self._pending:
            raise JpruneError(f"{path!r} is not a parameter of this model, or was written before")
        values = np.asarray(array)
        if values.shape != self._pending[path].shape:
            raise JpruneError(f"{path}: expected shape {self._pending[path].shape}, got {values.shape}")
        del self._pending[path]
        self._held[path] = cast(values, self._dtypes.get(path, values.dtype), path, saturate=self._saturate)
        self._written[path] = self._held[path].dtype
        if sum(held.nbytes for held in self._held.values()) >= PART_BYTES:
            self._save_part()

    def _save_part(self) -> None:
        from orbax.checkpoint import v1 as ocp

        with writing.explained(self._folder):
            ocp.partial.save((self._folder / _PARAMS).resolve(), trees.unflatten(self._held))
        self._held = {}

    def close(self) -> None:
        """Completes the checkpoint.

        Raises:
            JpruneError: some parameters were never written.
        """
        from orbax.checkpoint import v1 as ocp

        if self._pending:
            raise JpruneError(f"{len(self._pending)} parameters were not written, first {next(iter(self._pending))}")
        if self._held:
            self._save_part()
        with writing.explained(self._folder):
            ocp.partial.finalize((self._folder / _PARAMS).resolve())
            beside.write(self._folder, self._checkpoint, self._written)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def open_source(folder: Path) -> Source:
    """Opens a folder that `save` wrote; parameters are read when they are needed.

    Raises:
        JpruneError: an Orbax checkpoint without a config, or one that is damaged.
    """
    require("orbax.checkpoint")
    from orbax.checkpoint import v1 as ocp

    if not (folder / _PARAMS / _MARK).exists() or not (folder / "config.json").exists():
        raise JpruneError(
            f"{folder}: an Orbax checkpoint of something else; jprune reads folders with {_PARAMS}/ and config.json, "
            "as `jprune convert --format orbax` writes them"
        )
    path = (folder / _PARAMS).resolve()
    files = sorted(file for file in checked(path, folder.resolve()).rglob("*") if checked(file, folder).is_file())
    try:
        leaves = trees.flatten(ocp.metadata(path).metadata)
        if not leaves:  # Orbax logs why, and goes on
            raise ValueError("no parameters found in it")
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise JpruneError(
            f"{path}: the Orbax checkpoint is damaged or incomplete ({reason(error)}); write it again"
        ) from error

    def read(names: list[str]) -> dict[str, np.ndarray]:
        wanted = {name: ocp.PLACEHOLDER for name in leaves}
        wanted |= {name: np.empty(leaves[name].shape, leaves[name].dtype) for name in names}
        try:
            loaded = trees.flatten(ocp.load(path, trees.unflatten(wanted)))
            return {name: np.asarray(loaded[name]) for name in names}
        except Exception as error:
            raise JpruneError(
                f"{path}: {names[0]!r} cannot be read ({reason(error)}); write the checkpoint again"
            ) from error

    def read_one(name: str) -> np.ndarray:
        return read([name])[name]

    return Source(
        config=writing.read_json(checked(folder / "config.json", folder)),
        tensors={
            name: StoredTensor(
                shape=tuple(leaf.shape),
                dtype=np.dtype(leaf.dtype),
                where=_PARAMS,
                read=functools.partial(read_one, name),
            )
            for name, leaf in leaves.items()
        },
        layout="jprune",
        read_together=read,
        side_files=functools.partial(beside.read, folder),
        identity=functools.partial(identify, *files),
    )
