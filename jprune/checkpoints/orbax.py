"""Orbax checkpoints (v1 API): a folder with the parameters as an Orbax pytree, and config and tokenizer beside them.

    config.json, tokenizer.json, ...     as in a Hugging Face folder
    jprune.json                          the record
    params/                              the pytree, in our layout: nested dicts of arrays

Orbax's v1 API is young; everything that touches it is here.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jprune import trees
from jprune.checkpoints import huggingface, record, writing
from jprune.checkpoints.source import Source, StoredTensor, identify, reason
from jprune.errors import JpruneError

if TYPE_CHECKING:
    from jprune.checkpoints.checkpoint import Checkpoint

_PARAMS = "params"
_MARK = "_CHECKPOINT_METADATA"  # a file that Orbax puts into every checkpoint


def is_orbax(folder: Path) -> bool:
    """Whether a folder is, or contains, an Orbax checkpoint."""
    return (folder / _PARAMS / _MARK).exists() or (folder / _MARK).exists()


def save(
    folder: Path, checkpoint: "Checkpoint", params: Mapping[str, Any], contents: Mapping[str, Any] | None = None
) -> None:
    """Writes parameters and the config and tokenizer of `checkpoint` into an empty folder.

    Args:
        folder: an empty folder.
        checkpoint: where config and tokenizer come from, and which parameters there must be.
        params: nested dicts of arrays, NumPy's or JAX's, whatever their dtypes.
        contents: the record (`jprune.checkpoints.record`), written as well where given.

    Raises:
        JpruneError: parameters do not fit the model, or the disk is full.
    """
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
        huggingface.write_side_files(folder, checkpoint, {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()})
        ocp.save((folder / _PARAMS).resolve(), trees.unflatten(leaves))
        if contents is not None:
            record.write(folder, contents)


class Writer:
    """Takes parameters one by one, as `huggingface.Writer` does, and saves them all at the end: Orbax saves trees.

    Args:
        folder: an empty folder.
        checkpoint: where config and tokenizer come from, and which parameters there must be.
        dtypes: the dtype of each parameter in the file, by path; those not named keep what they come in.
    """

    def __init__(self, folder: Path, checkpoint: "Checkpoint", dtypes: Mapping[str, Any] | None = None):
        self._folder, self._checkpoint, self._dtypes = folder, checkpoint, dtypes or {}
        self._values: dict[str, np.ndarray] = {}

    def write(self, path: str, array: np.ndarray | jax.Array) -> None:
        """Keeps one parameter, in our layout."""
        values = np.asarray(array)
        self._values[path] = values.astype(self._dtypes.get(path, values.dtype), copy=False)

    def close(self) -> None:
        """Saves; arguments, errors and what is written are those of `save`."""
        save(self._folder, self._checkpoint, trees.unflatten(self._values))

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
    from orbax.checkpoint import v1 as ocp

    if not (folder / _PARAMS / _MARK).exists() or not (folder / "config.json").exists():
        raise JpruneError(
            f"{folder}: an Orbax checkpoint of something else; jprune reads folders with {_PARAMS}/ and config.json, "
            "as `jprune convert --format orbax` writes them"
        )
    path = (folder / _PARAMS).resolve()
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
        config=huggingface.read_json(folder / "config.json"),
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
        side_files=functools.partial(huggingface.read_side_files, folder),
        identity=functools.partial(identify, *sorted(file for file in path.rglob("*") if file.is_file())),
    )
