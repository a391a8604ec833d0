"""What a run tells: while it goes on, and when it is done.

The object that ``--json`` prints, and that opens a record, has first the fields of its kind of run, and then those
that every run has.
"""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jprune.evaluate.perplexity import Perplexity
from jprune.runs.stopwatch import peak_device_memory_bytes


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a phase is."""

    done: float
    """Units (blocks) done; the fraction counts stages and micro-batches of the current one."""
    total: int
    text: str
    """What is being worked on."""
    phase: str = "prune"
    """Name of the phase, such as "prune", "evaluate before" or "evaluate after"."""
    loss: float | None = None
    """Loss of the last step: of a reconstruction, or of training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """The result of a run, as far as all runs have the same to tell."""

    out: Path
    before: Perplexity | None
    after: Perplexity | None
    seconds: dict[str, float]
    peak_memory_bytes: int
    notices: tuple[str, ...]
    """What the user should know, one sentence each."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only this kind of run has."""
        raise NotImplementedError

    def json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        result = self.own_json()
        if self.before:
            result["perplexity"] = {
                "before": self.before.value,
                "after": self.after.value if self.after else None,
                "sequence_length": self.before.sequence_length,
                "windows": self.before.windows,
            }
        return {**result, "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes, "out": str(self.out)}

    @staticmethod
    def common_fields(contents: Mapping[str, Any], out: Path) -> dict[str, Any]:
        """The fields that all reports have, of an earlier run, from its record (`jprune.checkpoints.record`)."""
        return {
            "out": out,
            "before": perplexity_of(contents, "before"),
            "after": perplexity_of(contents, "after"),
            "seconds": contents["seconds"],
            "peak_memory_bytes": contents["peak_memory_bytes"],
            "notices": tuple(contents["notices"]),
        }


def perplexity_of(contents: Mapping[str, Any], when: str) -> Perplexity | None:
    """The perplexity "before" or "after" in a record; None if it was not measured."""
    measured = contents.get("perplexity", {})
    if measured.get(when) is None:
        return None
    length, count = measured["sequence_length"], measured["windows"]
    return Perplexity(value=measured[when], tokens=length * count, sequence_length=length, windows=count)


def environment(dtype: DTypeLike) -> dict[str, Any]:
    """What a result may depend on besides its recipe: dtype of the activations, versions, device."""
    return {
        "dtype": jnp.dtype(dtype).name,
        "versions": {name: importlib.metadata.version(name) for name in ("jprune", "jax", "jaxlib", "flax", "numpy")},
        "device": jax.devices()[0].device_kind,
        "peak_device_memory_bytes": peak_device_memory_bytes(),
    }
