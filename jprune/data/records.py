"""Records: the JSON objects of a file or the rows of a table, one after the other, each with its place for messages.

| file                                     | records                                     |
| ---------------------------------------- | ------------------------------------------- |
| `.jsonl`, `.jsonl.gz`, `.json.gz`        | one JSON value a line; blank lines skipped  |
| `.json`                                  | the items of one JSON list                  |
| `.parquet`                               | rows                                        |
"""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jprune import texts
from jprune.checkpoints.source import reason
from jprune.errors import JpruneError

Record = tuple[str, Any]
"""Where it stands, as words for a message, and what stands there."""

LINES = (".jsonl", ".jsonl.gz", ".json.gz")
ENDINGS = (*LINES, ".json", ".parquet")


class Reader(Iterator[Record]):
    """The records of a file whose name has one of `ENDINGS`, halves of characters replaced.

    Raises:
        JpruneError: damaged or malformed content, found when it is reached, or pyarrow is missing.
    """

    def __init__(self, path: Path):
        self._path, self._records = path, _read(path)
        self._mended: list[str] = []

    def __next__(self) -> Record:
        where, record, mended = next(self._records)
        if mended:
            self._mended.append(where)
        return where, record

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know about the records read so far, one sentence each."""
        if not self._mended:
            return ()
        others = f" and {len(self._mended) - 1} others" if len(self._mended) > 1 else ""
        return (f"{self._mended[0]}{others}: half of a character (a lone surrogate) is read as U+FFFD.",)


_Read = tuple[str, Any, bool]
"""A record, and whether it had to be mended."""


def _read(path: Path) -> Iterator[_Read]:
    try:
        if path.name.endswith(LINES):
            yield from _lines(path)
        elif path.name.endswith(".json"):
            yield from _list(path)
        else:
            yield from _rows(path)
    except OSError as error:
        raise JpruneError(f"{path} cannot be read: {reason(error)}.") from error


def found(record: Any) -> str:
    """What a record is, for messages: its fields, or its type."""
    return f"fields {sorted(map(str, record))}" if isinstance(record, dict) else type(record).__name__


def _lines(path: Path) -> Iterator[_Read]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(texts.lines(file, str(path)), start=1):  # type: ignore[arg-type]
                if line.strip():
                    yield f"{path}, line {number}", *texts.parsed(line)
    except json.JSONDecodeError as error:
        raise JpruneError(f"{path}, line {number}: not JSON ({error}). Expected one JSON object a line.") from error
    except (EOFError, zlib.error) as error:
        raise JpruneError(f"{path} is a damaged gzip file after line {number}: {error}.") from error


def _list(path: Path) -> Iterator[_Read]:
    try:
        items, mended = texts.parsed(texts.decoded(path.read_bytes(), str(path)))
    except json.JSONDecodeError as error:
        raise JpruneError(
            f"{path}: not JSON ({error}). Expected a list of objects; a file of one object a line is named .jsonl."
        ) from error
    if not isinstance(items, list):
        raise JpruneError(f"{path}: expected a JSON list of objects, found {found(items)}.")
    for number, item in enumerate(items, start=1):
        yield f"{path}, record {number}", item, mended and number == 1


def _rows(path: Path) -> Iterator[_Read]:
    """Rows as dicts, a batch at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise JpruneError(f"Reading {path} needs pyarrow: pip install 'jprune[data]'.") from error
    number = 0
    with readable_parquet(path):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in values(path, batch, before=number):
                number += 1
                yield f"{path}, record {number}", row, False


@contextlib.contextmanager
def readable_parquet(path: Path) -> Iterator[None]:
    """Errors of pyarrow as one of ours: of a damaged file it raises whatever its bytes led to."""
    try:
        yield
    except JpruneError:
        raise
    except Exception as error:
        raise JpruneError(f"{path} is not a readable parquet file: {reason(error)}.") from error


def values(path: Path, column: Any, *, before: int = 0) -> list[Any]:
    """What a column, or a batch of rows, of a parquet file holds in Python; `before` counts the rows before it.

    Raises:
        JpruneError: text that is not UTF-8, which parquet files may hold; names the record.
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(column)):
            try:
                column.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise JpruneError(
                    f"{path}, record {before + number + 1}: its text is not UTF-8 ({error.reason}); write the file anew"
                ) from error
        raise
