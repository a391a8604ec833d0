"""jprune.json: what was done to a model, beside the result, and what its files were when it was written."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jprune.checkpoints.writing import read_json, write_json
from jprune.errors import JpruneError

NAME = "jprune.json"
FORMAT_VERSION = 1


def write(folder: Path, contents: Mapping[str, Any]) -> None:
    """Writes the record of a result into its folder, when all else is there: it holds a digest of every file."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: _digest(path) for name, path in files.items() if name != NAME}
    whole = json.loads(json.dumps({"format_version": FORMAT_VERSION, **contents, "files": digests}))  # as it is read
    write_json(folder / NAME, {**whole, "checksum": _checksum(whole)})


def damaged(folder: Path) -> list[str]:
    """The files of a result that are not what they were when it was written, each with what is wrong; the record too.

    Raises:
        JpruneError: there is no record, a newer jprune wrote it, or it is of a version that noted no digests.
    """
    contents = read(folder)
    checksum, digests = contents.pop("checksum", None), contents.get("files")
    if checksum is None or not isinstance(digests, dict):
        raise JpruneError(f"{folder / NAME} has no digests of files: an older jprune wrote it, or it was edited")
    wrong = [f"{NAME} was changed"] if checksum != _checksum(contents) else []
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif _digest(path) != digest:
            wrong.append(f"{name} was changed")
    return wrong


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _checksum(contents: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def read(folder: Path) -> dict[str, Any]:
    """The record of a result.

    Raises:
        JpruneError: there is none, or a newer jprune wrote it.
    """
    if not (folder / NAME).exists():
        raise JpruneError(f"{folder}: no {NAME} there; it is written beside every model that jprune prunes")
    contents = read_json(folder / NAME)
    if (version := contents.get("format_version")) != FORMAT_VERSION:
        raise JpruneError(f"{folder / NAME}: format_version {version!r}, expected {FORMAT_VERSION}; update jprune")
    return contents
