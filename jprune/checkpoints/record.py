"""jprune.json: what was done to a model, beside the result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jprune.checkpoints.writing import read_json, write_json
from jprune.errors import JpruneError

NAME = "jprune.json"
FORMAT_VERSION = 1


def write(folder: Path, contents: Mapping[str, Any]) -> None:
    """Writes the record of a result into its folder."""
    write_json(folder / NAME, {"format_version": FORMAT_VERSION, **contents})


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
