"""Packed folders: every kernel in the smallest format that holds its zeros, everything else as it is.

    config.json, tokenizer.json, ...     as in a Hugging Face folder
    jprune.json                          the record
    packed.json                          the version, and of every parameter its file, shape, dtype and format
    packed-00001.safetensors, ...        the arrays

A parameter that is not packed is one array of its path's name. A packed kernel is the arrays of
`pallas_kernels.to_arrays` below its path: `blocks/0/attn/q/kernel/bits`; those of experts have their number between.
"""

from pathlib import Path

from jprune.checkpoints.packed.layout import INDEX, weight_files
from jprune.checkpoints.source import Source


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed model."""
    return (folder / INDEX).exists()


def discard(folder: Path) -> None:
    """Removes a packed model that an earlier process left in a folder, finished or not."""
    (folder / INDEX).unlink(missing_ok=True)
    for left in weight_files(folder):
        left.unlink()


def open_source(folder: Path) -> Source:
    """Opens a packed folder; see `jprune.checkpoints.packed.read`."""
    from jprune.checkpoints.packed import read  # with the kernels, for which who opens no such folder need not wait

    return read.open_source(folder)
