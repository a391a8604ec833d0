"""The report of a structured run: how small the model has become."""

import dataclasses
from typing import Any

from jprune.pipeline.registry import name_of
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

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only structured runs have."""
        return {
            "method": name_of(self.method),
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "layers": list(self.layers),
            "sizes": list(self.sizes),
        }
