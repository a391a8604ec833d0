"""Where tokens come from: one spec string names a text stream, a collection of documents, or rows of token ids.

| spec                          | what it is                                 | calibration | evaluation               |
| ----------------------------- | ------------------------------------------ | ----------- | ------------------------ |
| `pydoc`                       | stream: Python's language reference        | 3/4 of it   | the other topics         |
| a text file                   | stream: UTF-8                              | the file    | the same file            |
| `.jsonl`, `.jsonl.gz`         | documents: field `text` of one JSON a line | the file    | the same file            |
| `.json`                       | documents: field `text` of a list's items  | the file    | the same file            |
| `.parquet`                    | documents: column `text`                   | the file    | the same file            |
| `.npy`                        | token ids `[n, length]`, used as given     | the file    | the same file            |
| `hf:wikitext`                 | stream: wikitext-2-raw-v1                  | train       | test                     |
| `hf:c4`                       | documents: the first shard                 | train       | validation, 256 windows  |
| `hf:DATASET[:CONFIG[:SPLIT]]` | documents: column `text`                   | train       | test, else validation    |

A local file is not split: name two files to keep calibration and evaluation apart. `.json.gz` is read as `.jsonl.gz`
(C4's own shards are called so). A SPLIT that is named serves both purposes. Shards and joins of the Hugging Face
datasets are those of the SparseGPT and Wanda programs, so that numbers can be compared with published ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from jprune import paths, texts
from jprune.annotations import Integer
from jprune.checkpoints.source import reason
from jprune.data import records
from jprune.errors import JpruneError

Split = Literal["calibration", "evaluation"]

KINDS = (
    "pydoc, a text file, .jsonl, .jsonl.gz, .json, .parquet, .npy of token ids [n, length], "
    "or hf:DATASET[:CONFIG[:SPLIT]]"
)

# Fixed by name, so that the split is the same rule on every Python; about a quarter of the text on 3.11 to 3.13.
# A topic that a Python lacks is skipped, and a new one goes to calibration.
PYDOC_EVALUATION = frozenset({"comparisons", "import", "in", "string-methods", "types", "typesmapping"})

WIKITEXT = "Salesforce/wikitext"
C4 = "allenai/c4"
C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
C4_EVALUATION_DOCUMENTS = 1100
C4_EVALUATION_WINDOWS = 256


@dataclass(frozen=True, kw_only=True)
class _Source:
    notices: tuple[str, ...] = ()
    """What the user should know about how it was read, one sentence each."""


@dataclass(frozen=True, kw_only=True)
class Stream(_Source):
    """One long text: tokenised once, then cut. `max_windows` bounds what an evaluation takes of it."""

    text: str
    max_windows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Documents(_Source):
    """Separate texts: a calibration window lies within one of them."""

    texts: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class TokenRows(_Source):
    """Windows that the user has cut already; memory-mapped, so that only the rows taken are read."""

    rows: Integer[np.ndarray, "n length"]


Source = Stream | Documents | TokenRows


def read(spec: str | Path, split: Split) -> Source:
    """The tokens' source that `spec` names (see the module's table), for calibration or for evaluation.

    Raises:
        JpruneError: unknown or missing source, unreadable or malformed content, or an optional package that is missing.
    """
    name = str(spec)
    if name == "pydoc":
        return Stream(text=_pydoc(split))
    if name.startswith("hf:"):
        return _hugging_face(name, split)
    path = paths.given(name)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise JpruneError(f"Token source {name!r} {what}. A source is {KINDS}.")
    try:
        if name.endswith(".npy"):
            return TokenRows(rows=_npy(path))
        if name.endswith(".parquet"):
            return Documents(texts=_parquet(path))
        if name.endswith(records.ENDINGS):
            rows = records.Reader(path)
            return Documents(texts=[_text_field(*record) for record in rows], notices=rows.notices)
        return Stream(text=texts.decoded(path.read_bytes(), name))
    except OSError as error:
        raise JpruneError(f"{name} cannot be read: {reason(error)}.") from error


def _pydoc(split: Split) -> str:
    """The topics of one split, sorted by name.

    Topics repeat each other's paragraphs (`specialnames` holds `customization` whole). Each paragraph is kept only
    where it first comes, evaluation topics first, so that nothing evaluated was calibrated on.
    """
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise JpruneError(
            "This Python comes without pydoc_data.topics, which the source 'pydoc' reads; give a text file instead."
        ) from error
    seen: set[str] = set()
    kept: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted(topics, key=lambda name: (name not in PYDOC_EVALUATION, name)):
        for paragraph in topics[name].strip().split("\n\n"):
            words = " ".join(paragraph.split())
            # Short ones ("For example:") are the glue of the text and tell nothing.
            if len(words) >= 60:
                if words in seen:
                    continue
                seen.add(words)
            kept[name in PYDOC_EVALUATION].append(paragraph)
    return "\n\n".join(kept[split == "evaluation"])


def _npy(path: Path) -> np.ndarray:
    """A memory map of `path`. `open_memmap` reads the .npy format only: no pickled objects, no .npz."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header is read as Python, which fails in ways of its own
        raise JpruneError(f"{path} is not a readable .npy of token ids [n, length]: {reason(error)}.") from error
    return checked_rows(rows, str(path))


def checked_rows(rows: np.ndarray, name: str) -> np.ndarray:
    """The array, if it can be token ids [n, length]; an error that begins with its name, if not."""
    if rows.ndim != 2:
        raise JpruneError(f"{name} has shape {rows.shape}; expected token ids [n, length], one window a row.")
    if not np.issubdtype(rows.dtype, np.integer):
        raise JpruneError(f"{name} holds {rows.dtype}; expected integer token ids. Save it with .astype(np.int32).")
    return rows


def _text_field(where: str, row: Any) -> str:
    """`row["text"]`, or an error that says what `row` has instead."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise JpruneError(f"{where}: expected an object with a string in field 'text', found {records.found(row)}.")
    return row["text"]


def _parquet(path: Path) -> list[str]:
    """Column `text`; null is the empty text."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise JpruneError(f"Reading {path} needs pyarrow: pip install 'jprune[data]'.") from error
    with records.readable_parquet(path):
        names = pyarrow.parquet.read_schema(path).names
        if "text" not in names:
            raise JpruneError(f"{path} has no column 'text'; its columns are {', '.join(names)}.")
        column = pyarrow.parquet.read_table(path, columns=["text"]).column("text")
    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise JpruneError(f"{path}: column 'text' holds {column.type}; expected strings.")
    return [text or "" for text in records.values(path, column)]


class _Column(Sequence[str]):
    """Column `text` of a Hugging Face dataset, row by row: a shard of C4 is never held as Python strings."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]["text"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dataset["text"])  # read in batches: much faster than row by row


def is_text_dataset(spec: str) -> bool:
    """Whether an `hf:` spec names one of the datasets that are known to hold plain text."""
    return _parse(spec)[0] in (WIKITEXT, C4)


def _hugging_face(spec: str, split: Split) -> Stream | Documents:
    """The texts of a dataset of the Hugging Face hub."""
    name, dataset = hugging_face_dataset(spec, split)
    if "text" not in dataset.column_names:
        raise JpruneError(f"{spec!r} has no column 'text'; its columns are {', '.join(dataset.column_names)}.")
    texts = _Column(dataset)
    if name == WIKITEXT:
        return Stream(text=(" " if split == "calibration" else "\n\n").join(dataset["text"]))
    if name == C4 and split == "evaluation":
        first = [texts[i] for i in range(min(C4_EVALUATION_DOCUMENTS, len(texts)))]
        return Stream(text=" ".join(first), max_windows=C4_EVALUATION_WINDOWS)
    return Documents(texts=texts)


def hugging_face_dataset(spec: str, split: Split) -> tuple[str, Any]:
    """The name of a dataset of the Hugging Face hub, and its rows through the optional package `datasets`."""
    name, config, chosen = _parse(spec)
    try:
        import datasets
    except ImportError as error:
        raise JpruneError(f"Source {spec!r} needs the package datasets: pip install 'jprune[data]'.") from error
    if name == C4 and config is None:
        chosen = chosen or ("train" if split == "calibration" else "validation")
        if chosen not in C4_SHARDS:
            raise JpruneError(f"{spec!r}: c4 has no split {chosen!r}; it has {', '.join(C4_SHARDS)}.")
        # One shard has neither all splits nor the sizes that the dataset declares, and the checks would say so.
        options: dict[str, Any] = {"data_files": {chosen: C4_SHARDS[chosen]}, "verification_mode": "no_checks"}
    else:
        chosen = chosen or _default_split(datasets, spec, name, config, split)
        options = {}
    return name, _reach(spec, lambda: datasets.load_dataset(name, config, split=chosen, **options))


def _parse(spec: str) -> tuple[str, str | None, str | None]:
    """`hf:DATASET[:CONFIG[:SPLIT]]` -> (dataset, config, split); an empty part is one not given."""
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise JpruneError(f"{spec!r} is not of the form hf:DATASET[:CONFIG[:SPLIT]], e.g. hf:wikitext or hf:c4.")
    config, split = (part or None for part in (*rest, "", "")[:2])
    if name in ("wikitext", WIKITEXT):
        return WIKITEXT, config or "wikitext-2-raw-v1", split
    if name in ("c4", C4):
        # Without a config: the originals' shards, which are of `en`.
        return C4, None if config == "en" else config, split
    return name, config, split


def _default_split(datasets: ModuleType, spec: str, name: str, config: str | None, split: Split) -> str:
    """`train` for calibration; `test`, else `validation`, for evaluation."""
    available = _reach(spec, lambda: datasets.get_dataset_split_names(name, config))
    wanted = ("train",) if split == "calibration" else ("test", "validation")
    for candidate in wanted:
        if candidate in available:
            return candidate
    raise JpruneError(
        f"{spec!r} has no split {' or '.join(wanted)} for {split}; it has {', '.join(available)}. "
        "Name one: hf:DATASET:CONFIG:SPLIT."
    )


def _reach(spec: str, call: Callable[[], Any]) -> Any:
    """`call()`, with whatever `datasets` raises turned into one line: its errors have no common base class."""
    try:
        return call()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise JpruneError(
            f"{spec!r} could not be loaded: {reason.rstrip('.')}. Check the name and the network, "
            "or give a local file; the source 'pydoc' needs no network."
        ) from error
