"""Which files of a Hugging Face folder hold the model, with the precedence that transformers has.

The file that config.json names as `transformers_weights`, else model.safetensors, else the shards that
model.safetensors.index.json lists. A file that is given by its own path is taken; a shard stands for all of them.
Deviation: a single safetensors file of another name is read too where there is none of these.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jprune.checkpoints import writing
from jprune.checkpoints.huggingface.files import INDEX, WHOLE
from jprune.checkpoints.inside import checked
from jprune.errors import JpruneError

Where = dict[str, Path]
"""Which file holds each tensor: by key from the index, or {"": file} if one file holds all."""


def locate(path: Path, folder: Path, config: Mapping[str, Any]) -> tuple[Where, tuple[str, ...]]:
    """The files that hold the weights, and what to say where there was a choice.

    Args:
        path: what was given: the folder or a file in it.
        folder: the folder.
        config: the content of config.json.

    Raises:
        JpruneError: no weights, pickled ones, missing shards, or a name or a link that leaves the folder.
    """
    if path != folder:
        index = folder / INDEX
        listed = _read_index(index) if index.exists() and path.name != WHOLE else {}
        return (_inside(listed, folder), ()) if path in listed.values() else ({"": path}, ())
    where, notices = _locate(folder, config)
    return _inside(where, folder), notices


def _inside(where: Where, folder: Path) -> Where:
    for file in set(where.values()):
        checked(file, folder)
    return where


def _locate(folder: Path, config: Mapping[str, Any]) -> tuple[Where, tuple[str, ...]]:
    index = folder / INDEX
    others = _candidates(folder)
    if (name := config.get("transformers_weights")) is not None:
        where = _named(folder, name)
        unread = [file for file in others if file not in where.values()]
        told = f"{folder}: {name} was read, as config.json says, and not {unread[0].name}" if unread else ""
        return where, (told,) if told else ()
    if folder / WHOLE in others:
        told = f"{folder}: {WHOLE} was read, as transformers does, and not the shards of {INDEX}"
        shard = next((file for file in others if file.name != WHOLE), None)
        told += f"; to read those, give one of them: {shard}" if shard else ""
        return {"": folder / WHOLE}, (told,) if index.exists() else ()
    if index.exists():
        return _read_index(index), ()
    if len(others) == 1:
        return {"": others[0]}, ()
    raise _nothing(folder, others)


def holds_weights(folder: Path) -> bool:
    """Whether a folder has safetensors files that may be a model's."""
    return bool(_candidates(folder)) or (folder / INDEX).exists()


def _candidates(folder: Path) -> list[Path]:
    """Safetensors files but for adapters and Mistral's own copy of the weights."""
    return sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith(("consolidated", "adapter")))


def _nothing(folder: Path, others: list[Path]) -> JpruneError:
    if others:
        return JpruneError(f"{folder}: {len(others)} safetensors files and no {INDEX}; download the index as well")
    if pickled := [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]:
        return JpruneError(
            f"{folder}: only pickled weights there ({pickled[0]}), which are not read because they can run code; "
            "convert them to safetensors, for instance with https://huggingface.co/spaces/safetensors/convert"
        )
    return JpruneError(f"{folder}: no {WHOLE} and no {INDEX} there")


def _named(folder: Path, name: Any) -> Where:
    """The file, or the shards of the index, that config.json names."""
    said = f"{folder / 'config.json'}: transformers_weights"
    _check_inside(name, said)
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise JpruneError(f"{said} names {name!r}; only safetensors files and their index are read")
    if not (folder / name).exists():
        raise JpruneError(f"{said} names {name!r}, which is not there; download it, or remove the key")
    return _read_index(folder / name) if name.endswith(".json") else {"": folder / name}


def _read_index(index: Path) -> Where:
    weight_map = writing.read_json(checked(index, index.parent)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise JpruneError(f"{index}: expected a non-empty object 'weight_map'; download it again")
    for key, name in weight_map.items():
        _check_inside(name, f"{index}: {key!r}")
        if not name.endswith(".safetensors"):
            raise JpruneError(f"{index}: {key!r} points to {name!r}; only safetensors files are read")
    shards = {name: index.parent / name for name in weight_map.values()}
    if missing := sorted(name for name, path in shards.items() if not path.exists()):
        raise JpruneError(
            f"{index.parent}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; download them"
        )
    return {key: shards[name] for key, name in weight_map.items()}


def _check_inside(name: Any, said: str) -> None:
    if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or "\0" in name:
        raise JpruneError(f"{said} points outside its folder, to {name!r}; this is refused")
