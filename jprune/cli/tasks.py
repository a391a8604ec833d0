"""`jprune eval tasks`: what a model answers to the questions of lm-evaluation-harness."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

from jprune.cli import display
from jprune.cli.command import OnDevices, Told
from jprune.errors import JpruneError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalTasks(OnDevices):
    """Accuracy on tasks of lm-evaluation-harness (`pip install jprune[eval]`), with its standard errors."""

    tasks: str
    """Names of tasks, separated by commas: arc_easy,hellaswag,piqa. `lm-eval ls tasks` lists them."""
    fewshot: int | None = None
    """Examples before each question. By default what each task says."""
    limit: int | None = None
    """Items of each task, from the beginning. By default all."""
    include: Path | None = None
    """Folder with tasks of your own, as the harness writes them (YAML)."""
    chat: bool = False
    """Put the questions to the model in its chat template, as instruction models expect them."""
    seed: int = 0
    """Seed of the examples."""
    dtype: str | None = None
    """Dtype of the activations: float32, bfloat16 or float16. By default float32 on CPU and
    for float16 weights, else that of the weights."""

    def run(self) -> Told:
        """Measures."""
        if importlib.util.find_spec("lm_eval") is None:
            raise JpruneError("tasks need lm-evaluation-harness, which is not installed; `pip install 'jprune[eval]'`")
        from jprune.checkpoints import load
        from jprune.checkpoints.dtypes import activation_dtype
        from jprune.pipeline.tasks import Model, evaluate
        from jprune.runs.report import Progress

        names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        checkpoint = load(self.model)
        with display.progress() as show:
            model = Model(
                checkpoint,
                dtype=activation_dtype(checkpoint, self.dtype),
                mesh=self.mesh(),
                progress=lambda done, total: show(Progress(float(done), total, self.tasks, "tasks")),
            )
            found = evaluate(
                model,
                names,
                fewshot=self.fewshot,
                limit=self.limit,
                include=None if self.include is None else str(self.include),
                chat=self.chat,
                seed=self.seed,
            )
        return Told({"model": self.model, **_plain(found)}, show=functools.partial(_show, found))


def _plain(found: Any) -> Any:
    """As JSON has it; what it has not, as words."""
    if isinstance(found, dict):
        return {str(key): _plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_plain(value) for value in found]
    return found if found is None or isinstance(found, bool | int | float | str) else str(found)


def _show(found: Any) -> None:
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{filtered}")
            spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
            shots, samples = found["n-shot"].get(task), found["n-samples"].get(task, {}).get("effective")
            rows.append((task, name, filtered, "-" if shots is None else shots, samples or "-", f"{value:.4f}{spread}"))
    display.table(["task", "metric", "filter", "examples", "items", "value"], rows)
