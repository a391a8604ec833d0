"""A checkpoint: a model's config, its weights by path (read when asked for), and its tokenizer."""

import copy
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jprune import paths, texts, trees
from jprune.checkpoints import demo, huggingface, orbax, packed
from jprune.checkpoints import select as selection
from jprune.checkpoints.gguf import read as gguf
from jprune.checkpoints.huggingface import tokenizer
from jprune.checkpoints.inside import checked
from jprune.checkpoints.source import Entry, Source, StoredTensor, joined
from jprune.checkpoints.suggested import DEMO, USUAL, Suggested
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.blocks import InBlocks
from jprune.models.config import DecoderConfig, named_sizes
from jprune.models.parameters import shapes

_log = logging.getLogger(__name__)

# Buffers that old versions of transformers saved although they follow from the config: tables of rotary embeddings,
# causal masks and numbers of positions.
_DERIVED = re.compile(
    r"rotary\w*\.(\w*inv_freq|(cos|sin)_cached)$|(attn|attention)\.(masked_)?bias$|(^|\.)(causal_mask|position_ids)$"
)


def load(source: str | Path, *, weights: bool = True, adapter: str | Path | None = None) -> "Checkpoint":
    """Opens a model without reading its weights.

    Args:
        source: a Hugging Face folder or hub id, a .safetensors or .gguf file, an Orbax folder written by jprune, or
            "demo" (SmolLM2-135M-Instruct, fetched once).
        weights: False is content with config.json alone, for plans: shapes are known, and reading raises. Where there
            is no config.json (GGUF) it makes no difference.
        adapter: a folder with a LoRA adapter, as PEFT writes it, that is merged into the model as it is read.

    Raises:
        JpruneError: nothing there, not a model that is supported, damaged files, or an adapter of another model.
    """
    opened = _open(str(source), weights)
    if adapter is not None:
        opened = huggingface.adapters.merge(opened, Path(adapter).expanduser())
    for notice in opened.notices:
        _log.warning(notice)
    return Checkpoint(str(source), opened)


class Checkpoint:
    """A model on disk. Holds no weights.

    Attributes:
        source: as it was given to `load`.
        hf_config: config.json, as read or as rebuilt from GGUF metadata.
        shapes: shape and stored dtype of every parameter by path (where the file is quantised float32 for GGUF, else
            bfloat16).
    """

    def __init__(self, source: str, opened: Source):
        self.source = source
        self.hf_config = opened.config
        self._opened = opened
        self._config = None if opened.model is not None else _native(opened.config, source)
        self._tensors = dict(opened.tensors) if opened.model else _by_path(opened, self.config, source)
        self.shapes = {path: jax.ShapeDtypeStruct(t.shape, t.dtype) for path, t in self._tensors.items()}

    @functools.cached_property
    def model(self) -> InBlocks:
        """Its functions, from tokens to logits."""
        from jprune.models import decoder  # which takes long to import, and opening does without

        return self._opened.model or decoder.in_blocks(self.config)

    @property
    def road(self) -> str:
        """How the model is computed, as in `InBlocks`: "native", or by PyTorch's module."""
        return "native" if self._opened.model is None else self._opened.model.road

    @property
    def architecture(self) -> str:
        """As in config.json."""
        return self.config.architecture if self._opened.model is None else self._opened.model.architecture

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.config.layers if self._opened.model is None else self._opened.model.layers

    @property
    def config(self) -> DecoderConfig:
        """What the decoder needs to know.

        Raises:
            JpruneError: the model is not native; whatever asks for a config works on native models alone.
        """
        if self._config is None:
            raise JpruneError(
                f"{self.source}: {self.architecture} has no table in jprune and is computed by "
                f"{self.road}: its weights can be pruned, and it can be measured, but it cannot be made smaller, "
                "trained, packed, or generate text here; transformers loads what is pruned for that"
            )
        return self._config

    @property
    def table(self) -> Mapping[str, Entry]:
        """For every parameter by path: the Hugging Face tensors that store it, and how."""
        return self._opened.table if self._config is None else families.table(self._config)

    def read(self, path: str) -> np.ndarray:
        """One parameter in our layout and its stored dtype (a view of freshly read memory)."""
        if path not in self._tensors:
            raise JpruneError(
                f"{self.source}: no parameter {path!r}; there are {', '.join(list(self._tensors)[:3])}, ..."
            )
        return self._tensors[path].read()

    @property
    def reads_together(self) -> bool:
        """Whether `read_many` is much cheaper than many times `read`."""
        return self._opened.read_together is not None

    def read_many(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Several parameters by path, as `read` gives them."""
        if self._opened.read_together is not None:
            return self._opened.read_together(list(paths))
        return {path: self.read(path) for path in paths}

    @property
    def is_packed(self) -> bool:
        """Whether kernels are stored packed; `read` unpacks them."""
        return any(tensor.packed for tensor in self._tensors.values())

    def params(self, prefix: str = "", *, packed: bool = False) -> dict:
        """Nested dict of the parameters below `prefix`, such as "blocks/3"; of all of them if it is empty.

        Args:
            prefix: path of a part.
            packed: kernels that are stored packed stay so (`jprune.sparse.PackedKernel`), for the decoder to multiply
                by as they are.
        """
        start = f"{prefix}/" if prefix else ""
        below = [path for path in self._tensors if path.startswith(start)]
        if not below:
            raise JpruneError(f"{self.source}: no parameters below {prefix!r}")
        kernels = {path: read for path in below if packed and (read := self._tensors[path].packed)}
        values: dict[str, Any] = {**self.read_many([path for path in below if path not in kernels])}
        values |= {path: read() for path, read in kernels.items()}
        return trees.unflatten({path.removeprefix(start): values[path] for path in below})

    def select(self, keep: selection.Keep, layers: Sequence[int] | None = None) -> "Checkpoint":
        """The smaller model that keeps some positions of some axes and some layers: a view that copies nothing.

        Args:
            keep: positions that stay, in order, by path and axis: heads, kv_heads, d_ff, experts, d_expert, d_shared or
                d_model, which must be cut alike wherever they occur; of d_expert each expert may keep its own,
                [experts, kept]. Paths are those of this checkpoint, before layers are renumbered.
            layers: numbers of the layers that stay, in order; all of them unless given.

        Raises:
            JpruneError: positions or layers that there are not, or that do not make a model.
        """
        return Checkpoint(self.source, selection.open_source(self, keep, layers))

    def restated(self, hf_config: dict[str, Any], files: Mapping[str, bytes] = MappingProxyType({})) -> "Checkpoint":
        """The same model with another config.json and more files beside it, for formats that say it otherwise."""
        other = copy.copy(self)
        other.hf_config = hf_config
        other.side_files = {**self.side_files, **files}
        return other

    @functools.cached_property
    def side_files(self) -> dict[str, bytes]:
        """What travels with the weights: tokenizer, generation config, licence, by file name."""
        return self._opened.side_files()

    @functools.cached_property
    def tokenizer(self) -> tokenizer.Tokenizer | None:
        """The tokenizer, or None if there is none beside the weights."""
        return tokenizer.from_files(self.side_files, self.hf_config)

    @functools.cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generated text, as the generation config says, else the config."""
        generation = texts.beside(self.side_files, "generation_config.json")
        ids = generation.get("eos_token_id", self.hf_config.get("eos_token_id"))
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.count(self.shapes)

    def count(self, paths: Iterable[str]) -> int:
        """Number of parameters at some paths."""
        return sum(math.prod(self.shapes[path].shape) for path in paths)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in the dtypes of `shapes`."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parameters as they are stored: packed kernels without their zeros, quantised weights with their
        scales."""
        return sum(tensor.nbytes if (own := tensor.stored_bytes) is None else own for tensor in self._tensors.values())

    @property
    def sizes(self) -> tuple[dict[str, int], ...]:
        """The sizes of every layer by name: d_model, heads, kv_heads, d_ff, and experts where it has some; of a model
        that is not native the first."""
        if self._config is None:
            return ({"d_model": self.model.d_model},) * self.layers
        config = self.config
        return tuple({"d_model": config.d_model, **named_sizes(config, i)} for i in range(config.layers))

    @property
    def suggested(self) -> Suggested:
        """Sizes of windows for this model where the user asks for none."""
        return DEMO if self.source == "demo" else USUAL

    @property
    def in_cache(self) -> bool:
        """Whether the model lies in jprune's own cache, where what is found out about it may be kept beside it."""
        return self.source == "demo"

    def described(self) -> dict[str, str]:
        """What the record of a result says of the model that it was made from."""
        return {
            "source": self.source,
            "architecture": self.architecture,
            "road": self.road,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """A hash of the config, of samples of the weight files (`source.identify`) wherever they lie, and of the
        selection if there is one."""
        config = json.dumps(self.hf_config, sort_keys=True)
        return hashlib.sha256(f"{config}:{self._opened.identity()}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {self.architecture}, {self.layers} layers)"


def _open(source: str, weights: bool) -> Source:
    if source == "demo":
        return gguf.open_source(demo.fetch())
    path = paths.given(source)
    if path.is_dir():
        return _open_folder(path, weights)
    if path.is_file():
        if path.suffix == ".gguf":
            return gguf.open_source(path)
        if path.suffix == ".safetensors":
            if path.name == huggingface.adapters.WEIGHTS:
                huggingface.adapters.refuse(path.parent)
            return huggingface.open_source(path)
        raise JpruneError(
            f"{source}: only .safetensors and .gguf files are read, not {path.suffix or 'files like this'!r}"
        )
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith(".") and path.suffix != ".gguf":
        return _open_folder(huggingface.download(source, weights=weights), weights)
    raise JpruneError(f"{source}: no such file or folder, and not a name of a model on the Hugging Face hub either")


def _open_folder(folder: Path, weights: bool) -> Source:
    if not weights and (folder / "config.json").exists():
        if not huggingface.holds_weights(folder):
            huggingface.adapters.refuse(folder)
        return huggingface.open_config(folder)
    if packed.is_packed(folder):
        return packed.open_source(folder)
    if huggingface.holds_weights(folder):  # as transformers does, whatever else lies there
        return huggingface.open_source(folder)
    if orbax.is_orbax(folder):
        return orbax.open_source(folder)
    if ggufs := sorted(folder.glob("*.gguf")):
        if len(ggufs) > 1:
            raise JpruneError(f"{folder}: {len(ggufs)} GGUF files there; give one of them, such as {ggufs[0]}")
        return gguf.open_source(checked(ggufs[0], folder))
    huggingface.adapters.refuse(folder)
    return huggingface.open_source(folder)


def _native(hf_config: dict, source: str) -> DecoderConfig:
    try:
        return families.config(hf_config)
    except (KeyError, TypeError, AttributeError) as error:
        raise JpruneError(f"{source}: config.json is incomplete or not what it should be ({error!r})") from error


def _by_path(opened: Source, config: DecoderConfig, source: str) -> dict[str, StoredTensor]:
    """Tensors by our paths, checked against the config: nothing missing, nothing unknown, every shape as expected."""
    if opened.layout == "hugging_face":
        table = families.table(config)
        expected = {key: entry.shape for entry in table.values() for key in entry.keys}
    else:
        expected = shapes(config)
    given = opened.tensors
    if missing := [key for key in expected if key not in given]:
        hint = ""
        if missing[0] == families.ARCHITECTURES[config.architecture].model["head/kernel"][0]:
            hint = "; does config.json lack tie_word_embeddings, or was the base model saved, without its head?"
        raise JpruneError(
            f"{source}: {len(missing)} tensors that {config.architecture} needs are missing, first {missing[0]!r}{hint}"
        )
    for key, shape in expected.items():
        if problem := given[key].problem:
            raise JpruneError(problem)
        if given[key].shape != shape:
            raise JpruneError(
                f"{source}: tensor {key!r} in {given[key].where} has shape {given[key].shape}, "
                f"but config.json asks for {shape}; the weights and the config do not belong together"
            )
    unknown = [key for key in given if key not in expected and not _DERIVED.search(key)]
    if unknown:
        raise JpruneError(
            f"{source}: {len(unknown)} tensors are not part of a {config.architecture} with this config, "
            f"first {unknown[0]!r}; leaving them out would change what the model computes"
        )
    if opened.layout != "hugging_face":
        return {path: given[path] for path in expected}
    return {path: joined([given[key] for key in entry.keys], entry) for path, entry in table.items()}
