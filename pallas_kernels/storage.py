"""Packed kernels as plain arrays, for `numpy.savez`, safetensors and the like.

One array is a header: JSON in bytes, with format, version, shape, dtypes and tile. The others are integers and the
float32 scales, so nothing needs to know bfloat16 or float8.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from pallas_kernels.bitmap import SPARE
from pallas_kernels.errors import FormatError
from pallas_kernels.formats import FORMATS, VERSION, Bitmap, Packed

_HEADER = "header"
_META = ("shape", "dtype", "values", "tile", "version", "capacity")


def to_arrays(packed: Packed) -> dict[str, np.ndarray]:
    """Every array of a packed kernel by name, and its header."""
    header: dict[str, Any] = {"format": packed.name}
    arrays: dict[str, np.ndarray] = {}
    for field in dataclasses.fields(packed):
        value = getattr(packed, field.name)
        if field.name in _META:
            header[field.name] = value
        elif isinstance(value, tuple):
            arrays |= {f"{field.name}.{i}": np.asarray(x) for i, x in enumerate(value)}
        elif value is not None:
            arrays[field.name] = np.asarray(value)
    return {_HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Packed:
    """The packed kernel of `to_arrays`; raises FormatError for data that is newer, damaged or something else."""
    if _HEADER not in arrays:
        raise FormatError(f"no packed kernel: expected an array named {_HEADER!r}; got {sorted(arrays)}")
    try:
        header = json.loads(bytes(np.asarray(arrays[_HEADER])))
    except ValueError as error:
        raise FormatError(f"no packed kernel: its header is not JSON ({error})") from error
    if header.get("version", 0) > VERSION:
        raise FormatError(
            f"packed data of version {header['version']}, newer than {VERSION}, the newest known here: update jprune"
        )
    if header.get("format") not in FORMATS:
        raise FormatError(f"packed data of format {header.get('format')!r}; known here: {', '.join(FORMATS)}")
    cls: Any = FORMATS[header.pop("format")]
    fields = {f.name for f in dataclasses.fields(cls)}
    found = {name: value for name, value in arrays.items() if name != _HEADER}
    planes = sorted((name for name in found if name.startswith("planes.")), key=lambda n: int(n.split(".")[1]))
    options = {**header, **{name: np.asarray(value) for name, value in found.items() if name not in planes}}
    if planes:
        options["planes"] = tuple(np.asarray(found[name]) for name in planes)
    missing = fields - set(options) - {"scale"}
    if missing or set(options) - fields:
        raise FormatError(
            f"packed {cls.name} with missing {sorted(missing)}, unknown {sorted(set(options) - fields)}: damaged?"
        )
    packed = cls(**{k: tuple(v) if k in ("shape", "tile") else v for k, v in options.items()})
    _check_shapes(packed)
    return packed


def _check_shapes(packed: Packed) -> None:
    """Raises a FormatError where an array's shape is not that of the header."""
    m, k = packed.grid
    rows, columns = packed.tile
    expected = {
        "bits": (m, k, rows, columns // 32),
        "tiles": (m, k),
        "rows": (m, k, rows),
        "offsets": (m * k + 1,),
        "scale": (packed.shape[1],),
    }
    leaves = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    wrong = {n: x.shape for n, x in leaves.items() if n in expected and x is not None and x.shape != expected[n]}
    planes = {f"planes.{i}": x.shape for i, x in enumerate(leaves.get("planes", ()))}
    wrong |= {name: shape for name, shape in planes.items() if shape != (m, k, rows, columns // 8)}
    if wrong:
        raise FormatError(f"{packed!r}: arrays of shapes {wrong}, expected {expected}: damaged?")
    if isinstance(packed, Bitmap):
        # A kernel reads where these point, without asking whether anything is there.
        counts = np.bitwise_count(packed.bits.view(np.uint32)).sum(-1, dtype=np.int64)
        ends = packed.tiles.astype(np.int64)[..., None] + packed.rows + counts
        room = packed.words.nbytes // packed.itemsize - SPARE // packed.itemsize
        if packed.tiles.min() < 0 or packed.rows.min() < 0 or ends.max() > room:
            raise FormatError(f"{packed!r}: places up to {ends.max()} in a stream of {room} values: damaged?")
