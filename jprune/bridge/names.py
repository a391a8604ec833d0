"""The tensors of a checkpoint's files as parameters of a module, and back.

transformers keeps tables of how names and tensors of files become those of its modules (`conversion_mapping`): other
names, the kernels of experts, each a tensor in the files, stacked, and kernels that are one tensor in the files apart.
They are read here and not run, so that each parameter is read by itself, and written back under the names and in the
shapes that the files had.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from jprune.errors import JpruneError

Index = tuple[int | slice, ...]
DERIVED = re.compile(r"rotary\w*\.(\w*inv_freq|(cos|sin)_cached)$|(attn|attention)\.(masked_)?bias$|position_ids$")
"""Buffers that old versions of transformers saved although they follow from the config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """Where one parameter is stored: each tensor is a piece of it, or it is a part of one tensor; some axes swapped.

    The face of `jprune.models.families.Entry`.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    """Of each stored tensor."""
    path_shape: tuple[int, ...]
    """Of the parameter."""
    pieces: tuple[Index, ...]
    """Which part of the parameter each tensor is."""
    swapped: tuple[int, int] | None = None
    """Axes of the parameter that are exchanged in the files."""
    part: Index = ()
    """Which part of the one stored tensor the parameter is."""
    interleaved: tuple[int, int] | None = None
    """(axis, n): the positions of that axis in the one stored tensor, row by row a matrix of n columns, are the
    parameter's column by column."""

    @property
    def whole(self) -> bool:
        """Whether no other parameter lies in the same tensors."""
        return not self.part

    @property
    def key(self) -> str:
        """The first of the keys."""
        return self.keys[0]

    @property
    def stacked(self) -> bool:
        """Whether there are several tensors, or one that lies otherwise than the parameter."""
        return len(self.keys) > 1 or self.swapped is not None or self.interleaved is not None

    def read(self, *stored: np.ndarray) -> np.ndarray:
        """The parameter, out of its stored tensors."""
        return self.read_in_turn(stored)

    def read_in_turn(self, stored: Iterable[np.ndarray]) -> np.ndarray:
        """`read`, of tensors of one dtype that come one by one."""
        tensors = iter(stored)
        tensor = next(tensors)
        if len(self.keys) == 1:
            return np.ascontiguousarray(self._seen(tensor)).reshape(self.path_shape)
        found = np.empty(self._laid_out, tensor.dtype)
        for index in self.pieces[:-1]:
            found[index] = tensor
            tensor = next(tensors)
        found[self.pieces[-1]] = tensor
        return found if self.swapped is None else np.ascontiguousarray(np.swapaxes(found, *self.swapped))

    def write(self, parameter: np.ndarray) -> np.ndarray:
        """The stored tensor of a parameter that is one."""
        return parameter

    def write_to(self, index: int, parameter: np.ndarray, out: np.ndarray) -> None:
        """Fills the stored tensor `keys[index]`."""
        if len(self.keys) == 1:
            seen = self._seen(out)
            seen[...] = parameter.reshape(seen.shape)
        else:
            laid_out = parameter if self.swapped is None else np.swapaxes(parameter, *self.swapped)
            out[...] = laid_out[self.pieces[index]]

    def _seen(self, stored: np.ndarray) -> np.ndarray:
        """A view of the one stored tensor, whose elements come in the order of the parameter's."""
        seen = stored[self.part]
        if self.interleaved is not None:
            axis, columns = self.interleaved
            shape = seen.shape
            seen = np.swapaxes(seen.reshape(*shape[:axis], -1, columns, *shape[axis + 1 :]), axis, axis + 1)
        return seen if self.swapped is None else np.swapaxes(seen, *self.swapped)

    @property
    def _laid_out(self) -> tuple[int, ...]:
        shape = list(self.path_shape)
        if self.swapped is not None:
            a, b = self.swapped
            shape[a], shape[b] = shape[b], shape[a]
        return tuple(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """What the tensors of files are to a module."""

    entries: dict[str, Pieces]
    """Where its parameters are stored, by PyTorch's name."""
    twins: dict[str, list[str]]
    """Further tensors of the same parameter, as of a head that is tied."""
    unread: list[str]
    """Tensors that transformers leaves alone."""


def stored_in(module: Any, given: Mapping[str, tuple[int, ...]], what: str) -> Stored:
    """Where the parameters of a module are stored.

    Args:
        module: a `jprune.bridge.module.Module`.
        given: the shapes of the tensors in the files by their names.
        what: the model, for messages.

    Raises:
        JpruneError: tensors that are missing or unknown, that do not fit, or that transformers makes into parameters
            in a way that is not followed.
    """
    own = module.module
    table = get_model_conversion_mapping(own)
    renamings = [entry for entry in table if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, loading.WeightConverter)]
    tensors = own.state_dict()
    state = dict.fromkeys(tensors, 0)
    found: dict[str, list[tuple[str | None, str]]] = {}
    unread, unknown = [], []
    ignored = [re.compile(regex) for regex in own._keys_to_ignore_on_load_unexpected or ()]
    for key in sorted(given, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, own.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name in state:
            found.setdefault(name, []).append((pattern, key))
        elif any(regex.search(key) or regex.search(name) for regex in (*ignored, DERIVED)):
            unread.append(key)
        else:
            unknown.append(key)
    if unknown:
        raise JpruneError(
            f"{what}: {len(unknown)} tensors are no part of the module, first {unknown[0]!r}; leaving them out would "
            "change what the model computes"
        )
    if integers := [name for name in found if not tensors[name].is_floating_point()]:
        raise JpruneError(
            f"{what}: {integers[0]} is a table of integers in the files, which decides what the model computes; jprune "
            "reads no integers yet"
        )
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    entries: dict[str, Pieces] = {}
    twins: dict[str, list[str]] = {}
    for name, sources in sorted(found.items(), key=lambda item: item[0] in module.aliases):
        known, pattern = module.aliases.get(name, name), sources[0][0]
        if known in entries:
            twins.setdefault(known, []).extend(key for _, key in sources)
        elif known in module.shapes and pattern is None:
            entries[known] = _alone(sources[0][1], module.shapes[known], given, what)
        elif known in module.shapes and len(by_pattern[pattern].target_patterns) > 1:
            entries |= _apart(name, sources, by_pattern[pattern], module, given, what)
        elif known in module.shapes:
            entries[known] = _joined(known, sources, by_pattern[pattern], module.shapes[known], given, what)
    if missing := [name for name in module.shapes if name not in entries and name not in module.buffers]:
        raise JpruneError(
            f"{what}: {len(missing)} tensors that the module needs are missing, first {missing[0]!r}; does config.json "
            "lack tie_word_embeddings, or was the base model saved, without its head?"
        )
    return Stored(entries=entries, twins=twins, unread=unread)


def _alone(key: str, shape: tuple[int, ...], given: Mapping[str, tuple[int, ...]], what: str) -> Pieces:
    if given[key] != shape:
        raise JpruneError(
            f"{what}: tensor {key!r} has shape {given[key]}, but config.json asks for {shape}; the weights and the "
            "config do not belong together"
        )
    return alone(key, shape)


def alone(key: str, shape: tuple[int, ...]) -> Pieces:
    """A parameter that is one tensor as it lies in the files."""
    return Pieces(keys=(key,), shape=shape, path_shape=shape, pieces=((),))


def _refused(name: str, sources: Sequence[tuple[str | None, str]], converter: Any, what: str) -> JpruneError:
    return JpruneError(
        f"{what}: transformers makes {name} of {len(sources)} tensors, first {sources[0][1]!r}, by "
        f"{', '.join(type(o).__name__ for o in converter.operations)}, which jprune does not follow yet"
    )


def _unlike(keys: Sequence[str], size: tuple[int, ...], names: str, what: str) -> JpruneError:
    return JpruneError(
        f"{what}: {len(keys)} tensors of shape {size}, first {keys[0]!r}, do not make {names}; the weights and the "
        "config do not belong together"
    )


def _apart(
    name: str,
    sources: Sequence[tuple[str | None, str]],
    converter: Any,
    module: Any,
    given: Mapping[str, tuple[int, ...]],
    what: str,
) -> dict[str, Pieces]:
    """Parameters that transformers makes of one tensor, one after the other along an axis of it.

    `Split` does it by the sizes of the parameters, `Chunk` makes them of one size.
    """
    first, (operation, *more) = converter.target_patterns[0], converter.operations
    names = [name.replace(first, target) for target in converter.target_patterns]
    known = [own for own in names if own in module.shapes]
    kind = type(operation).__name__
    if more or len(sources) > 1 or kind not in ("Split", "Chunk") or len(set(known)) < len(converter.target_patterns):
        raise _refused(name, sources, converter, what)
    ((_, key),) = sources
    size, axis = given[key], operation.dim % len(given[key])
    entries, start = {}, 0
    for own in names:
        shape = module.shapes[own]
        stop = start + (shape[axis] if len(shape) == len(size) else 0)
        part = (*[slice(None)] * axis, slice(start, stop))
        if shape != (*size[:axis], stop - start, *size[axis + 1 :]):
            raise _unlike([key], size, f"{own} of shape {shape}", what)
        entries[own] = Pieces(keys=(key,), shape=size, path_shape=shape, pieces=((),), part=part)
        start = stop
    if start != size[axis] or (kind == "Chunk" and len({module.shapes[own] for own in names}) > 1):
        raise _unlike([key], size, f"{', '.join(names)} of shapes {[module.shapes[own] for own in names]}", what)
    return entries


def _joined(
    name: str,
    sources: Sequence[tuple[str | None, str]],
    converter: Any,
    shape: tuple[int, ...],
    given: Mapping[str, tuple[int, ...]],
    what: str,
) -> Pieces:
    """A parameter that transformers makes of several tensors, or of one that lies otherwise."""
    operations = list(converter.operations)
    kinds = [type(operation).__name__ for operation in operations]
    swapped = None
    if kinds and kinds[-1] == "Transpose":
        swapped = (operations[-1].dim0 % len(shape), operations[-1].dim1 % len(shape))
        operations, kinds = operations[:-1], kinds[:-1]
    refused = _refused(name, sources, converter, what)
    by_pattern: dict[str, list[str]] = {}
    for pattern, key in sources:
        by_pattern.setdefault(str(pattern), []).append(key)
    groups = [by_pattern[p] for p in converter.source_patterns if p in by_pattern]
    sizes = {given[key] for keys in groups for key in keys}
    if len(sizes) != 1 or len(groups) != len(converter.source_patterns):
        raise refused
    (size,) = sizes
    if kinds == ["Interleave"] and len(sources) == 1 and size == shape:
        return _interleaved(sources[0][1], operations[0], size)
    if kinds == ["Inkling2UnpadVocab"] and len(sources) == 1 and size == shape:  # nothing is padded
        return alone(sources[0][1], size)
    stacked = kinds[:1] == ["MergeModulelist"]
    if stacked and operations[0].dim != 0:
        raise refused
    rest = operations[1:] if stacked else operations
    if [type(o).__name__ for o in rest] not in ([], ["Concatenate"]) or (not rest and len(groups) > 1):
        raise refused
    if not stacked and any(len(keys) > 1 for keys in groups):
        raise refused
    axis = rest[0].dim % (len(size) + stacked) if rest else 0
    keys, pieces = [], []
    for number, own in enumerate(groups):
        for position, key in enumerate(own):
            index: list[int | slice] = [slice(None)] * (len(size) + stacked)
            if rest:
                length = size[axis - stacked]
                index[axis] = slice(number * length, (number + 1) * length)
            if stacked:
                index[0] = position
            keys.append(key)
            pieces.append(tuple(index))
    entry = Pieces(keys=tuple(keys), shape=size, path_shape=shape, pieces=tuple(pieces), swapped=swapped)
    if sum(int(np.prod(size)) for _ in keys) != int(np.prod(shape)):
        raise _unlike(keys, size, f"{name} of shape {shape}", what)
    return entry


def _interleaved(key: str, operation: Any, shape: tuple[int, ...]) -> Pieces:
    """A parameter of which every second position of an axis comes first in turn, or the reverse."""
    axis = operation.dim % len(shape)
    columns = shape[axis] // 2 if operation.inverse else 2
    return Pieces(keys=(key,), shape=shape, path_shape=shape, pieces=((),), interleaved=(axis, columns))
