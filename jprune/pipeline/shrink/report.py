"""The report of a structured run: how small the model has become."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jprune.pipeline.oneshot.report import KernelReport
from jprune.pipeline.registry import name_of
from jprune.pipeline.shrink.experts import ExpertsLeft
from jprune.runs.report import RunReport
from jprune.structured.base import UnitMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkReport(RunReport):
    """The result of a structured run."""

    method: UnitMethod
    parameters: tuple[int, int]
    """Numbers of parameters before and after."""
    sizes: tuple[dict[str, int], ...]
    """The sizes of every layer of the result."""
    layers: tuple[int, ...]
    """Which layers of the original these are."""
    experts: tuple[ExpertsLeft, ...] = ()
    """Which experts stay of every layer, where experts go."""
    kernels: tuple[KernelReport, ...] = ()
    """Those that were refitted to make up for the inputs that they lost; shapes are those before."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only structured runs have."""
        return {
            "method": name_of(self.method),
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "layers": list(self.layers),
            "sizes": list(self.sizes),
            "refitted": len(self.kernels),
            **({"experts": [own._asdict() for own in self.experts]} if self.experts else {}),
        }

    @classmethod
    def from_record(cls, contents: Mapping[str, Any], out: Path, method: UnitMethod) -> "ShrinkReport":
        """The report of an earlier run of a method, from its record (`jprune.checkpoints.record`)."""
        return cls(
            **cls.common_fields(contents, out),
            method=method,
            parameters=(contents["parameters"]["before"], contents["parameters"]["after"]),
            sizes=tuple(contents["sizes"]),
            layers=tuple(contents["layers"]),
            kernels=tuple(map(KernelReport.from_json, contents.get("compensation", {}).get("kernels", ()))),
            experts=tuple(ExpertsLeft.from_json(own) for own in contents.get("experts", ())),
        )
