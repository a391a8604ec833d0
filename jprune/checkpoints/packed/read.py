"""Reads packed folders; a kernel is read packed, or unpacked where somebody wants the array."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from jprune.checkpoints import beside, writing
from jprune.checkpoints.huggingface.read import FLOATS, open_file, read_config
from jprune.checkpoints.inside import checked
from jprune.checkpoints.packed.layout import DENSE, FORMAT_VERSION, INDEX, Stored, prefix
from jprune.checkpoints.source import FLOAT_DTYPES, Source, StoredTensor, identify
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.parameters import block_kernels, is_stack
from jprune.sparse import PackedKernel, from_arrays, rooms

_KNOWN = {**FLOATS, "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8)}
_KNOWN |= {"U8": np.dtype(np.uint8)}


def open_source(folder: Path) -> Source:
    """Opens a folder that `Writer` wrote; parameters are read when they are needed.

    Raises:
        JpruneError: a newer version, files that are missing or damaged, or an index that does not fit them.
    """
    config = read_config(folder)
    stored = _index(folder)
    files: dict[str, dict[str, StoredTensor]] = {}
    for name in sorted({line.file for line in stored.values()}):
        if PurePosixPath(name).name != name or "\\" in name or "\0" in name:
            raise JpruneError(f"{folder / INDEX}: {name!r} is outside the folder; this is refused")
        if not (folder / name).is_file():
            raise JpruneError(f"{folder}: {name} is missing; download it, or pack the model again")
        files[name] = open_file(checked(folder / name, folder), _KNOWN)[0]
    inputs = block_kernels(families.config(config))
    arrays = {path: _arrays(folder, path, line, files[line.file], path in inputs) for path, line in stored.items()}
    room = rooms(
        {path: max(_words(kernel) for kernel in kernels) for path, kernels in arrays.items() if path in inputs}
    )
    tensors = {}
    for path, line in stored.items():
        if line.format == DENSE:
            tensors[path] = arrays[path][0][""]
            continue
        read = functools.partial(_kernel, folder, path, line, arrays[path], inputs[path], room[path])
        tensors[path] = StoredTensor(
            shape=line.shape,
            dtype=FLOAT_DTYPES[line.dtype],
            where=line.file,
            read=functools.partial(_dense, read),
            packed=read,
            stored_bytes=sum(_bytes(array) for kernel in arrays[path] for array in kernel.values()),
        )
    return Source(
        config=config,
        tensors=tensors,
        layout="jprune",
        side_files=functools.partial(beside.read, folder),
        identity=functools.partial(identify, folder / INDEX, *(folder / name for name in files)),
    )


def _index(folder: Path) -> dict[str, Stored]:
    """How every parameter is stored, by path."""
    path = checked(folder / INDEX, folder)
    contents = writing.read_json(path)
    if (version := contents.get("format_version")) != FORMAT_VERSION:
        raise JpruneError(f"{path}: format_version {version!r}, expected {FORMAT_VERSION}; update jprune")
    lines = contents.get("parameters")
    if not isinstance(lines, dict):
        raise JpruneError(f"{path}: expected an object 'parameters'; pack the model again")
    try:
        return {name: Stored.from_json(line) for name, line in lines.items()}
    except ValueError as error:
        raise JpruneError(f"{path}: {error}; pack the model again") from error


def _arrays(
    folder: Path, path: str, line: Stored, there: Mapping[str, StoredTensor], is_kernel: bool
) -> list[dict[str, StoredTensor]]:
    """The arrays of a parameter by name: of every kernel of a stack, or one that is not packed below ""."""
    if line.format == DENSE:
        if path not in there:
            raise JpruneError(f"{folder / line.file}: no array {path!r}, which {INDEX} names; pack the model again")
        return [{"": there[path]}]
    if not is_kernel or line.dtype not in FLOAT_DTYPES:
        raise JpruneError(f"{folder / INDEX}: {path} as {line.format} of {line.dtype}; expected a kernel of a block")
    numbers = range(line.shape[0]) if is_stack(path) else [None]
    found = []
    for number in numbers:
        begin = prefix(path, number)
        arrays = {name.removeprefix(begin): array for name, array in there.items() if name.startswith(begin)}
        if not arrays:
            raise JpruneError(f"{folder / line.file}: no arrays {begin}*, which {INDEX} names; pack the model again")
        found.append(arrays)
    return found


def _bytes(array: StoredTensor) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _words(arrays: Mapping[str, StoredTensor]) -> int:
    """Words of a bitmap's values; 0 of other formats."""
    return arrays["words"].shape[0] if "words" in arrays and arrays["words"].shape else 0


def _kernel(
    folder: Path, path: str, line: Stored, arrays: list[dict[str, StoredTensor]], inputs: int, room: int
) -> PackedKernel:
    """A packed kernel, or a stack of them."""
    own = line.shape[1:] if is_stack(path) else line.shape
    kernels = []
    for each in arrays:
        if problem := next((array.problem for array in each.values() if array.problem), None):
            raise JpruneError(problem)
        try:
            values = {name: array.read() for name, array in each.items()}
            kernels.append(from_arrays(values, own, inputs, FLOAT_DTYPES[line.dtype]))
        except JpruneError as error:
            raise JpruneError(f"{folder / line.file}: {path}: {error}; pack the model again") from error
    kernels = [kernel.with_room(room) for kernel in kernels]
    return kernels[0].stack(kernels[1:]) if is_stack(path) else kernels[0]


def _dense(read: Callable[[], PackedKernel]) -> np.ndarray:
    return read().dense()
