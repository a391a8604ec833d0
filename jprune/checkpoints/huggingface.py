"""Hugging Face folders: safetensors (single or sharded), config.json and the files that travel with them.

Only safetensors are read. Pickled weights (pytorch_model.bin) can run code when they are opened and are refused.
"""

import fnmatch
import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jprune.checkpoints import decilm, writing
from jprune.checkpoints.source import FLOAT_DTYPES, Source, StoredTensor, identify, reason
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.config import shapes

if TYPE_CHECKING:
    from jprune.checkpoints.checkpoint import Checkpoint

_INDEX = "model.safetensors.index.json"
# Files that travel with the weights: tokenizer, generation, licence (which its terms usually ask for).
_SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
_STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def download(repo_id: str, *, weights: bool = True) -> Path:
    """Fetches a model from the Hugging Face hub (or finds it in the hub's cache) and returns its folder.

    Without `weights` only what lies beside them is fetched.

    Raises:
        JpruneError: no such model, no permission, or no network and not in the cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            allow_patterns=[*(("*.safetensors", "*.index.json") if weights else ()), "config.json", *_SIDE_FILES],
            # Other copies of the same weights, in subfolders or under Mistral's own names.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except errors.GatedRepoError as error:
        raise JpruneError(
            f"{repo_id} is gated: accept its terms on https://huggingface.co/{repo_id} and run `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise JpruneError(
            f"{repo_id!r} is neither a local file or folder nor a model on huggingface.co "
            "(if it is a private one, run `hf auth login`)"
        ) from error
    except Exception as error:  # the hub's own kinds, and those of whatever HTTP library it uses
        raise JpruneError(
            f"{repo_id} is not in the local cache and cannot be fetched from huggingface.co ({reason(error)}); "
            "connect to the network, or give a local folder"
        ) from error
    return Path(folder)


def open_source(path: Path) -> Source:
    """Opens a folder with config.json and safetensors, or one .safetensors file with config.json beside it.

    Raises:
        JpruneError: no config, quantised or pickled weights, missing or damaged files, an index that leaves the folder.
    """
    folder = path.parent if path.is_file() else path
    config = _read_config(folder)
    where = _locate(path, folder)
    tensors: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(where.values()):
        tensors |= {key: t for key, t in _open_file(file).items() if where.get(key, file) == file}
    if lost := [key for key in where if key not in tensors and key != ""]:
        raise JpruneError(
            f"{where[lost[0]]}: tensor {lost[0]!r} is not in the file that {_INDEX} names for it; download it again"
        )
    files = sorted(set(where.values()))
    return Source(
        config=config,
        tensors=tensors,
        layout="hugging_face",
        side_files=functools.partial(read_side_files, folder),
        identity=functools.partial(identify, *files),
    )


def open_config(folder: Path) -> Source:
    """Opens a folder for its config.json alone: every tensor has a shape, and none can be read.

    Raises:
        JpruneError: no config, or one that is not supported.
    """
    hf_config = _read_config(folder)
    name = str(hf_config.get("dtype") or hf_config.get("torch_dtype")).removeprefix("torch.")

    def read() -> np.ndarray:
        raise JpruneError(f"{folder}: opened without weights (weights=False); open it with them to read parameters")

    return Source(
        config=hf_config,
        tensors={
            path: StoredTensor(
                shape=shape, dtype=FLOAT_DTYPES.get(name, FLOAT_DTYPES["float32"]), where="config.json", read=read
            )
            for path, shape in shapes(families.config(hf_config)).items()
        },
        layout="jprune",
        side_files=functools.partial(read_side_files, folder),
        identity=lambda: "no weights",
    )


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method")
        raise JpruneError(
            f"{folder}: the weights are quantised ({method}); give the unquantised model, or a GGUF of it"
        )
    return decilm.plain(config)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file, with errors that name the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JpruneError(f"{path.parent}: no {path.name} there; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise JpruneError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise JpruneError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer, generation config and licence of a folder."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _SIDE_FILES)
    }


def _locate(path: Path, folder: Path) -> dict[str, Path]:
    """Which file holds each tensor: by key from the index, or {"": file} if one file holds all."""
    index = folder / _INDEX
    if index.exists():
        where = _read_index(index)
        if path == folder or path in where.values():
            return where
    if path != folder:
        return {"": path}
    candidates = sorted(
        file for file in folder.glob("*.safetensors") if not file.name.startswith(("consolidated", "adapter"))
    )
    if folder / "model.safetensors" in candidates:
        return {"": folder / "model.safetensors"}
    if len(candidates) == 1:
        return {"": candidates[0]}
    if candidates:
        raise JpruneError(f"{folder}: {len(candidates)} safetensors files and no {_INDEX}; download the index as well")
    if pickled := [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]:
        raise JpruneError(
            f"{folder}: only pickled weights there ({pickled[0]}), which are not read because they can run code; "
            "convert them to safetensors, for instance with https://huggingface.co/spaces/safetensors/convert"
        )
    raise JpruneError(f"{folder}: no model.safetensors and no {_INDEX} there")


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise JpruneError(f"{index}: expected a non-empty object `weight_map`; download it again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name:
            raise JpruneError(f"{index}: {key!r} points outside its folder, to {name!r}; this is refused")
        if not name.endswith(".safetensors"):
            raise JpruneError(f"{index}: {key!r} points to {name!r}; only safetensors files are read")
    shards = {name: index.parent / name for name in weight_map.values()}
    if missing := sorted(name for name, path in shards.items() if not path.exists()):
        raise JpruneError(
            f"{index.parent}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; download them"
        )
    return {key: shards[name] for key, name in weight_map.items()}


def _open_file(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:  # checks the header, also against the file's size
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            info = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
        starts = _data_starts(path)
    except (SafetensorError, OSError) as error:
        raise JpruneError(f"{path}: truncated or damaged safetensors ({reason(error)}); download it again") from error

    def stored(key: str) -> StoredTensor:
        shape, stored_dtype = info[key]
        if stored_dtype not in _STORED_DTYPES:
            raise JpruneError(
                f"{path}: tensor {key!r} is stored as {stored_dtype}; supported: {', '.join(_STORED_DTYPES)}"
            )
        dtype = FLOAT_DTYPES[_STORED_DTYPES[stored_dtype]]
        read = functools.partial(_read_tensor, path, key, starts[key], shape, dtype)
        return StoredTensor(shape=shape, dtype=dtype, where=path.name, read=read)

    return {key: stored(key) for key in info}


def _data_starts(path: Path) -> dict[str, int]:
    """Where in the file each tensor's data begin; the header has been checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def _read_tensor(path: Path, key: str, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Reads instead of mapping: pages of a mapped file stay in this process's memory, more of them with every block."""
    count = math.prod(shape)
    try:
        values = np.fromfile(path, dtype, count, offset=start)
    except OSError as error:
        raise JpruneError(f"{path}: {key!r} cannot be read ({reason(error)})") from error
    if len(values) < count:
        raise JpruneError(f"{path}: truncated since it was opened: {key!r} is not whole; download it again")
    return values.reshape(shape)


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

    Raises:
        JpruneError: the disk is full or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: "Checkpoint",
        dtypes: Mapping[str, Any] | None = None,
        *,
        max_shard_bytes: int | float = 5e9,
        reopen: bool = False,
        follow: bool = False,
    ):
        self.folder = folder
        self._entries = families.table(checkpoint.config)
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
                write_side_files(folder, checkpoint, self._dtypes)
            self._shards: dict[str, writing.SafetensorsFile] = {}
            plan = _shards(sizes, max_shard_bytes)
            for i, keys in enumerate(plan):
                name = f"model-{i + 1:05}-of-{len(plan):05}.safetensors" if len(plan) > 1 else "model.safetensors"
                tensors = {key: stored[key] for key in keys}
                file = writing.SafetensorsFile(folder / name, tensors, reopen=reopen, follow=follow)
                self._shards |= dict.fromkeys(keys, file)

    def write(self, path: str, array: np.ndarray | jax.Array) -> int:
        """Writes one parameter, in our layout, cast to its dtype in the file; returns the checksum of what is there.

        Each path is written once.
        """
        if path not in self._pending:
            raise JpruneError(f"{path!r} is not a parameter of this model, or was written before")
        entry, values = self._entries[path], np.asarray(array)
        if values.shape != entry.path_shape:
            raise JpruneError(f"{path}: expected shape {entry.path_shape}, got {values.shape}")
        with writing.explained(self.folder):
            values = values.astype(self._dtypes[path], copy=False)
            if _plain(entry):
                checksum = self._shards[entry.key].write(entry.key, entry.write(values))
            else:
                checksum = self._write_parts(entry, values)
        del self._pending[path]
        return checksum

    def _write_parts(self, entry: families.Entry, values: np.ndarray) -> int:
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
                write_json(self.folder / _INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map})

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, and their index."""
    return [*sorted(folder.glob("*.safetensors")), *folder.glob(_INDEX)]


def _plain(entry: families.Entry) -> bool:
    """Whether a parameter is one whole tensor."""
    return entry.whole and not entry.stacked


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one JSON object, readably."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_side_files(folder: Path, checkpoint: "Checkpoint", dtypes: Mapping[str, np.dtype]) -> None:
    """Writes config.json, with the dtype that most parameters have, and everything that travels with the model."""
    counts: dict[str, int] = {}
    for path, leaf in checkpoint.shapes.items():
        counts[dtypes[path].name] = counts.get(dtypes[path].name, 0) + leaf.size
    config = dict(checkpoint.hf_config)
    key = (
        "dtype" if "dtype" in config else "torch_dtype"
    )  # transformers 5 writes the first, everything reads the second
    config[key] = max(counts, key=lambda name: counts[name])
    write_json(folder / "config.json", config)
    for name, content in checkpoint.side_files.items():
        (folder / name).write_bytes(content)


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
