"""Names in a packed folder, and the lines of its index."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "packed.json"
FORMAT_VERSION = 1
"""Grows when older versions of jprune would read a folder wrongly."""
DENSE = "dense"
"""The format of what is not packed."""


def part(number: int) -> str:
    """The name of a file of arrays."""
    return f"packed-{number:05}.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The files of arrays in a folder."""
    return sorted(folder.glob("packed-*.safetensors"))


def prefix(path: str, number: int | None) -> str:
    """What the names of a packed kernel's arrays begin with; of one of a stack with its number."""
    return f"{path}/" if number is None else f"{path}/{number}/"


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a parameter is stored: a line of the index."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    format: str

    @classmethod
    def from_json(cls, line: Any) -> "Stored":
        """A line as it is read.

        Raises:
            ValueError: it is none.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(line, dict) or set(line) != names:
            raise ValueError(f"expected {', '.join(sorted(names))}, found {line!r}")
        shape = line["shape"]
        if not isinstance(shape, list) or not all(isinstance(n, int) and 0 < n < 2**40 for n in shape):
            raise ValueError(f"{shape!r} is no shape")
        if not all(isinstance(line[name], str) for name in names - {"shape"}):
            raise ValueError(f"expected text for file, dtype and format, found {line!r}")
        return cls(**{**line, "shape": tuple(shape)})


def header(arrays: dict[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of arrays, as `writing.SafetensorsFile` is told them."""
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}
