"""A part of a checkpoint as a checkpoint: some positions of some axes, some of the layers.

Structured pruning changes no weight that stays, so its result is such a view: config and shapes of the smaller model,
and every tensor cut out of the larger one when it is read.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jprune import positions as at
from jprune.checkpoints.model import Readable
from jprune.checkpoints.source import Source, StoredTensor
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.config import LAYER_SIZES, DecoderConfig, LayerSizes
from jprune.models.parameters import parameters, shapes

Keep = Mapping[str, Mapping[int, Sequence[int] | np.ndarray]]
"""The positions that stay, by path and axis; other axes stay whole. Those of experts may be each one's own,
[experts, kept] (see `jprune.positions`)."""

_BY_LAYER = ("windows", "ropes")
_UNTOUCHED = tuple(
    field.name
    for field in dataclasses.fields(DecoderConfig)
    if field.name not in ("d_model", "layers", "sizes", *LAYER_SIZES, *_BY_LAYER)
)
SELECTABLE = (*LAYER_SIZES, "d_model")
"""Names of axes that can become smaller."""


_WHERE = {
    "heads": ("attn/q", 1),
    "kv_heads": ("attn/k", 1),
    "d_ff": ("mlp/down", 0),
    "experts": ("mlp/router", 1),
    "d_expert": ("mlp/experts/down", 1),
    "d_shared": ("mlp/shared/down", 0),
}
"""The kernel, and the axis of it, that has each size of a layer."""


def open_source(checkpoint: Readable, keep: Keep, layers: Sequence[int] | None) -> Source:
    """The source behind `Checkpoint.select`, which says what is expected and what is raised."""
    config = checkpoint.config
    left = _checked_layers(config, layers)
    positions = _checked_positions(config, keep)
    whole = {new: path for path in checkpoint.shapes if (new := _renumbered(path, left)) is not None}

    def read(old: str) -> np.ndarray:
        return at.cut(checkpoint.read(old), positions.get(old, {}))

    tensors: dict[str, StoredTensor] = {}
    for path, old in whole.items():
        tensors[path] = StoredTensor(
            shape=at.left(checkpoint.shapes[old].shape, positions.get(old, {})),
            dtype=np.dtype(checkpoint.shapes[old].dtype),
            where=checkpoint.source,
            read=functools.partial(read, old),
        )

    def read_together(paths: list[str]) -> dict[str, np.ndarray]:
        values: dict[str, np.ndarray] = {}
        for _, part in itertools.groupby(paths, key=lambda path: path.split("/")[:2]):  # a block at a time
            names = list(part)
            block = checkpoint.read_many([whole[path] for path in names])
            values |= {path: at.cut(block.pop(whole[path]), positions.get(whole[path], {})) for path in names}
        return values

    return Source(
        config=_config(checkpoint, {path: tensor.shape for path, tensor in tensors.items()}, left),
        tensors=tensors,
        layout="jprune",
        read_together=read_together if checkpoint.reads_together else None,
        side_files=lambda: checkpoint.side_files,
        identity=functools.partial(_identity, checkpoint, left, positions),
    )


def _checked_layers(config: DecoderConfig, layers: Sequence[int] | None) -> list[int]:
    left = list(range(config.layers)) if layers is None else [int(i) for i in layers]
    if not left or left != sorted(set(left)) or left[0] < 0 or left[-1] >= config.layers:
        raise JpruneError(
            f"expected the numbers of at least one layer, each once and in order, between 0 and {config.layers - 1}; "
            f"got {left}"
        )
    return left


def _checked_positions(config: DecoderConfig, keep: Keep) -> dict[str, dict[int, np.ndarray]]:
    names = parameters(config)
    positions: dict[str, dict[int, np.ndarray]] = {}
    for path, axes in keep.items():
        if path not in names:
            raise JpruneError(f"{path!r} is not a parameter of this model; there are {', '.join(list(names)[:3])}, ...")
        for axis, kept in axes.items():
            what = f"{path}, axis {axis}"
            if not 0 <= axis < len(names[path]):
                raise JpruneError(f"{what}: there are {len(names[path])} axes")
            name = names[path][axis]
            if name not in SELECTABLE:
                raise JpruneError(f"{what}: {name} cannot become smaller; only {', '.join(SELECTABLE)} can")
            indices = np.asarray(kept)
            size = config.size(name, path)
            if not indices.size:
                raise JpruneError(f"{what} ({name}): no position is left; at least one must stay")
            each = name == "d_expert" and indices.ndim == 2 and len(indices) == config.size("experts", path)
            if (indices.ndim != 1 and not each) or not np.issubdtype(indices.dtype, np.integer):
                raise JpruneError(f"{what} ({name}): expected a row of positions, got {kept!r}")
            if (np.diff(indices) < 1).any() or indices.min() < 0 or indices.max() >= size:
                raise JpruneError(
                    f"{what} ({name}): expected positions in order, each once, between 0 and {size - 1}; got {kept!r}"
                )
            if name == "experts":
                _check_groups(config, indices, size, what)
            positions.setdefault(path, {})[axis] = indices
    return positions


def _check_groups(config: DecoderConfig, kept: np.ndarray, size: int, what: str) -> None:
    """Groups of experts are told by their numbers."""
    counts = np.bincount(kept // (size // config.expert_groups), minlength=config.expert_groups)
    if len(set(counts.tolist())) > 1:
        raise JpruneError(
            f"{what} (experts): they are in {config.expert_groups} groups, of each of which equally many must stay; "
            f"got {', '.join(map(str, counts))}"
        )


def _renumbered(path: str, left: list[int]) -> str | None:
    """The path a parameter has when only these layers are left; None if its layer is gone."""
    if not path.startswith("blocks/"):
        return path
    _, index, rest = path.split("/", 2)
    return f"blocks/{left.index(int(index))}/{rest}" if int(index) in left else None


def _config(checkpoint: Readable, found: Mapping[str, tuple[int, ...]], left: list[int]) -> dict:
    """The config.json of the smaller model, from its shapes."""
    sizes = _sizes(checkpoint, found, len(left))
    d_model = found["blocks/0/attn/o/kernel"][2]
    hf_config = families.resized(
        checkpoint.hf_config,
        d_model=d_model,
        head_dim=None if checkpoint.config.kv_rank else checkpoint.config.head_dim,
        layers=left,
        sizes=sizes,
    )
    config = families.config(hf_config)
    _check_meaning(checkpoint.config, config, d_model, sizes, left)
    names = parameters(config)
    for path, shape in shapes(config).items():
        for axis, (is_, should) in enumerate(zip(found[path], shape)):
            if is_ != should:
                name = names[path][axis]
                raise JpruneError(
                    f"{path}: {is_} positions of axis {axis} are kept, but {should} of {name} in the parameters that "
                    f"belong with it; an axis must be cut alike wherever it occurs"
                )
    return hf_config


def _sizes(checkpoint: Readable, found: Mapping[str, tuple[int, ...]], layers: int) -> list[LayerSizes]:
    """The sizes of each layer that is left.

    A layer of experts has no MLP, and one with an MLP no experts: there it has the sizes that most other layers have,
    so that layers are equal where they can be.
    """
    by_name = {}
    for name, (kernel, axis) in _WHERE.items():
        has = {i: found[path][axis] for i in range(layers) if (path := f"blocks/{i}/{kernel}/kernel") in found}
        usual = collections.Counter(has.values()).most_common(1)[0][0] if has else getattr(checkpoint.config, name)
        by_name[name] = [has.get(i, usual) for i in range(layers)]
    if checkpoint.config.experts and families.sizes.one_width(families.explicit(checkpoint.hf_config)):
        by_name["d_ff"] = by_name["d_expert"]
    return [LayerSizes(**{name: sizes[i] for name, sizes in by_name.items()}) for i in range(layers)]


def _check_meaning(
    whole: DecoderConfig, part: DecoderConfig, d_model: int, sizes: list[LayerSizes], left: list[int]
) -> None:
    """The smaller config must have the sizes that were asked for and compute as before: some families derive more from
    their sizes (Gemma the scale of its embedding from the hidden size, ALiBi its slopes from the number of heads)."""
    if (part.d_model, [part.layer(i) for i in range(part.layers)]) != (d_model, sizes):
        raise JpruneError(f"{whole.architecture}: its config.json has no way to say the sizes of this part")
    if whole.alibi and any(now.heads != whole.layer(i).heads for now, i in zip(sizes, left)):
        raise JpruneError(f"{whole.architecture}: ALiBi's slopes follow from the number of heads, so all must stay")
    expected = {name: getattr(whole, name) for name in _UNTOUCHED}
    expected |= {name: tuple(by_layer[i] for i in left) for name in _BY_LAYER if (by_layer := getattr(whole, name))}
    expected["dense_layers"] = tuple(new for new, old in enumerate(left) if old in whole.dense_layers)
    for name, value in expected.items():
        if getattr(part, name) != value:
            raise JpruneError(
                f"{whole.architecture} derives {name} from its sizes: it would become {getattr(part, name)} instead of "
                f"{value}, and the part would not compute what it did"
            )


def _identity(checkpoint: Readable, left: list[int], positions: Mapping[str, Mapping[int, np.ndarray]]) -> str:
    digest = hashlib.sha256(f"{checkpoint.fingerprint()}:{left}".encode())
    for path in sorted(positions):
        for axis in sorted(positions[path]):
            digest.update(f"{path}:{axis}:".encode() + positions[path][axis].astype("<i8").tobytes())
    return digest.hexdigest()
