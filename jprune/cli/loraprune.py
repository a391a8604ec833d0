"""`jprune prune loraprune`: pruning while adapters are trained."""

import dataclasses
from pathlib import Path
from typing import Any

from jprune.cli import display
from jprune.cli.shrink import change, show_plan
from jprune.cli.tune import TrainingRun, print_report
from jprune.errors import UsageError
from jprune.tuning.loraprune import LoRAPrune, loraprune_model, plan_loraprune


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneWithLoRA(TrainingRun):
    """Prune a model while adapters are trained."""

    method: LoRAPrune
    out: Path | None = None
    """Folder of the result; it appears when everything is done. The state of the run is kept beside it, in OUT.run."""
    plan: bool = False
    """Print the sizes of the result, and touch nothing. Works on a folder that holds only a config.json."""

    def run(self) -> dict[str, Any]:
        """Prunes, or prints the plan."""
        if self.plan:
            return show_plan(plan_loraprune(self.model, method=self.method), json=self.json)
        if self.out is None:
            raise UsageError("give --out DIR for the result (or --plan to see its sizes)")
        with display.progress() as progress:
            report = loraprune_model(self.model, self.out, method=self.method, progress=progress, **self.options())
        print_report(report, json=self.json)
        if not self.json:
            gone, of = report.pruned
            what = "weights" if self.method.sparsity is not None else "heads and channels"
            print(f"{gone:,} of {of:,} {what} went; parameters: {change(report.parameters, report.parameters_after)}")
        return report.json()
