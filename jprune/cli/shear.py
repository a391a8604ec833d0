"""`jprune prune shearing`: a smaller model found by masks while it is trained."""

import dataclasses
from pathlib import Path
from typing import Any

from jprune.cli import display
from jprune.cli.shrink import change, show_plan
from jprune.cli.tune import TrainingRun, print_report
from jprune.errors import UsageError
from jprune.tuning.shearing import Shearing, plan_shearing, shear_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shear(TrainingRun):
    """Prune a model to a target shape while it is trained."""

    method: Shearing
    out: Path | None = None
    """Folder of the result; it appears when everything is done. The state of the run is kept beside it, in OUT.run."""
    plan: bool = False
    """Print the sizes of the result, and touch nothing. Works on a folder that holds only a config.json."""

    def run(self) -> dict[str, Any]:
        """Prunes, or prints the plan."""
        if self.plan:
            return show_plan(plan_shearing(self.model, method=self.method), json=self.json)
        if self.out is None:
            raise UsageError("give --out DIR for the result (or --plan to see its sizes)")
        with display.progress() as progress:
            report = shear_model(self.model, self.out, method=self.method, progress=progress, **self.options())
        print_report(report, json=self.json)
        if not self.json:
            print(f"expected sizes {report.expected}; of the result {report.target}")
            print(f"parameters: {change(report.parameters, report.parameters_after)}")
        return report.json()
