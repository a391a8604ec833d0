"""Records: the JSON objects of a file or the rows of a table, one after the other, each with its place for messages.

| file                                     | records                                     |
| ---------------------------------------- | ------------------------------------------- |
| `.jsonl`, `.jsonl.gz`, `.json.gz`        | one JSON value a line; blank lines skipped  |
| `.json`                                  | the items of one JSON list                  |
| `.parquet`                               | rows                                        |
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jprune.errors import JpruneError

Record = tuple[str, Any]
"""Where it stands, as words for a message, and what stands there."""

LINES = (".jsonl", ".jsonl.gz", ".json.gz")
ENDINGS = (*LINES, ".json", ".parquet")


def read(path: Path) -> Iterator[Record]:
    """The records of a file whose name has one of `ENDINGS`.

    Raises:
        JpruneError: damaged or malformed content, found when it is reached, or pyarrow is missing.
    """
    try:
        if path.name.endswith(LINES):
            yield from _lines(path)
        elif path.name.endswith(".json"):
            yield from _list(path)
        else:
            yield from _rows(path)
    except UnicodeDecodeError as error:
        raise JpruneError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}).") from error
    except OSError as error:
        raise JpruneError(f"{path} cannot be read: {error}.") from error


def found(record: Any) -> str:
    """What a record is, for messages: its fields, or its type."""
    return f"fields {sorted(map(str, record))}" if isinstance(record, dict) else type(record).__name__


def _lines(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise JpruneError(f"{path}, line {number}: not JSON ({error}). Expected one JSON object a line.") from error
    except (EOFError, zlib.error) as error:
        raise JpruneError(f"{path} is a damaged gzip file after line {number}: {error}.") from error


def _list(path: Path) -> Iterator[Record]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise JpruneError(
            f"{path}: not JSON ({error}). Expected a list of objects; a file of one object a line is named .jsonl."
        ) from error
    if not isinstance(items, list):
        raise JpruneError(f"{path}: expected a JSON list of objects, found {found(items)}.")
    for number, item in enumerate(items, start=1):
        yield f"{path}, record {number}", item


def _rows(path: Path) -> Iterator[Record]:
    """Rows as dicts, a batch at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise JpruneError(f"Reading {path} needs pyarrow: pip install 'jprune[data]'.") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, record {number}", row
    except pyarrow.ArrowException as error:
        raise JpruneError(f"{path} is not a readable parquet file: {error}.") from error
