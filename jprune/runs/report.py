"""What a run tells: while it goes on, and when it is done."""

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
from jprune.trees import Sparsity


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a phase is."""

    done: float
    """Units (blocks) done; the fraction counts stages and micro-batches of the current one."""
    total: int
    text: str
    """What is being worked on."""
    phase: str = "prune"
    """"prune", "evaluate before" or "evaluate after"."""
    loss: float | None = None
    """Reconstruction loss of the last kernel that was solved for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """One pruned kernel."""

    path: str
    shape: tuple[int, ...]
    pattern: str
    zeros: int
    size: int
    loss: float | None
    """Reconstruction loss over the calibration tokens, where the method knows it."""
    few_tokens: tuple[int, ...] = ()
    """Experts that saw too few tokens, and were pruned by magnitude."""

    @classmethod
    def from_json(cls, contents: Mapping[str, Any]) -> "KernelReport":
        """Out of what `dataclasses.asdict` made of it, and JSON after that."""
        return cls(
            **{**contents, "shape": tuple(contents["shape"]), "few_tokens": tuple(contents.get("few_tokens", ()))}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a run."""

    out: Path
    method: str
    pattern: str
    sparsity: Sparsity
    before: Perplexity | None
    after: Perplexity | None
    seconds: dict[str, float]
    peak_memory_bytes: int
    kernels: tuple[KernelReport, ...]
    notices: tuple[str, ...]
    """What the user should know, one sentence each."""

    def json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        result: dict[str, Any] = {
            "method": self.method,
            "pattern": self.pattern,
            "sparsity": {"achieved": self.sparsity.achieved, **dataclasses.asdict(self.sparsity)},
        }
        if self.before:
            result["perplexity"] = {
                "before": self.before.value,
                "after": self.after.value if self.after else None,
                "sequence_length": self.before.sequence_length,
                "windows": self.before.windows,
            }
        return {
            **result,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "out": str(self.out),
        }

    @classmethod
    def from_record(cls, contents: Mapping[str, Any], out: Path) -> "Report":
        """The report of an earlier run, from its record (`jprune.checkpoints.record`)."""
        counts = {field.name: contents["sparsity"][field.name] for field in dataclasses.fields(Sparsity)}
        return cls(
            out=out,
            method=contents["method"],
            pattern=contents["pattern"],
            sparsity=Sparsity(**counts),
            before=perplexity_of(contents, "before"),
            after=perplexity_of(contents, "after"),
            seconds=contents["seconds"],
            peak_memory_bytes=contents["peak_memory_bytes"],
            kernels=tuple(map(KernelReport.from_json, contents["kernels"])),
            notices=tuple(contents["notices"]),
        )


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
