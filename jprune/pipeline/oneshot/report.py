"""The report of a one-shot run: what became of every kernel."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jprune.runs.report import RunReport
from jprune.trees import Sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """One pruned kernel."""

    path: str
    shape: tuple[int, ...]
    pattern: str
    zeros: int
    """Of those that were to be pruned: where only some experts were, of theirs."""
    size: int
    loss: float | None
    """Reconstruction loss over the calibration tokens, where the method knows it."""
    reconstructed: float | None = None
    """Held-out error of its block after local reconstruction, as a share of what it was before."""
    few_tokens: tuple[int, ...] = ()
    """Experts that saw too few tokens, and were pruned by magnitude."""
    experts: tuple[int, ...] | None = None
    """The experts that were pruned; None for all, or if there are none."""

    @classmethod
    def from_json(cls, contents: Mapping[str, Any]) -> "KernelReport":
        """A report from what `dataclasses.asdict` and JSON made of it."""
        rows = {name: tuple(contents.get(name) or ()) for name in ("shape", "few_tokens")}
        experts = contents.get("experts")
        return cls(**{**contents, **rows, "experts": None if experts is None else tuple(experts)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(RunReport):
    """The result of a run."""

    method: str
    pattern: str
    sparsity: Sparsity
    kernels: tuple[KernelReport, ...]
    allocation: Mapping[str, Any] | None = None
    """How zeros were shared out, and the sparsity of every block; None if it is uniform."""
    chosen: Mapping[str, str] | None = None
    """What `auto` chose, and why; None if the user did."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only one-shot runs have."""
        own = {"method": self.method, "pattern": self.pattern, "sparsity": self.sparsity.json()}
        own |= {"allocation": self.allocation} if self.allocation else {}
        return own | ({"chosen": self.chosen} if self.chosen else {})

    @classmethod
    def from_record(cls, contents: Mapping[str, Any], out: Path) -> "Report":
        """The report of an earlier run, from its record (`jprune.checkpoints.record`)."""
        return cls(
            **cls.common_fields(contents, out),
            method=contents["method"],
            pattern=contents["pattern"],
            sparsity=Sparsity.from_json(contents["sparsity"]),
            kernels=tuple(map(KernelReport.from_json, contents["kernels"])),
            allocation=contents.get("allocation"),
            chosen=contents.get("chosen"),
        )
