"""The perplexity of a model that lies in jprune's cache (the demo), measured once and kept beside it.

Half of what a run spends on measuring goes to the model as it was, and that is the same each time. A file is named
after everything that its number depends on, this program's source and the machine included; what is damaged, or
cannot be written, is measured again. Other models lie where nobody expects files of jprune's, so nothing is kept of
them.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

import jprune.evaluate.perplexity as measuring
from jprune import devices, paths
from jprune.checkpoints import Checkpoint
from jprune.evaluate.perplexity import Perplexity
from jprune.models.weights import Weights
from jprune.runs import processes
from jprune.runs.folder import read_mark, write_mark
from jprune.runs.report import environment

logger = logging.getLogger(__name__)
_SOURCE = Path(devices.__file__).parent


def perplexity(
    weights: Weights,
    tokens: np.ndarray,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of a model, see `jprune.evaluate.perplexity`; that of the demo model is measured once."""
    mesh = mesh or devices.make_mesh()
    # Processes measure together, and one that remembers would leave the others waiting.
    path = None if processes.are_many() else _place(weights, tokens, dtype, mesh)
    if path is not None and (known := read_mark(path)) is not None:
        return Perplexity(**known)
    measured = measuring.perplexity(weights, tokens, dtype=dtype, mesh=mesh, progress=progress)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mark(path, dataclasses.asdict(measured))
        except OSError as error:
            logger.info("the perplexity of the model is not kept: %s", error)
    return measured


def _place(weights: Weights, tokens: np.ndarray, dtype: DTypeLike, mesh: Mesh) -> Path | None:
    """The file of what a model's perplexity on these windows is; None if nothing is kept of the model."""
    if not isinstance(weights, Checkpoint) or not weights.in_cache:
        return None
    about = environment(dtype)
    key = {
        "model": weights.fingerprint(),
        "windows": [tokens.shape, hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()],
        **{name: about[name] for name in ("dtype", "versions", "device")},
        "mesh": dict(mesh.shape),
        "cores": os.cpu_count(),
        "flags": os.environ.get("XLA_FLAGS"),
        "program": _program(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return paths.cache_folder() / "perplexity" / f"{digest[:32]}.json"


@functools.cache
def _program() -> str:
    """A hash of this program's source, which changes in a clone while its version does not."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
