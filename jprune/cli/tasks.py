"""`jprune eval tasks`: what a model answers to the questions of lm-evaluation-harness."""

import dataclasses
import functools
import importlib.util
from typing import Annotated, Any

from jprune.cli import display
from jprune.cli.command import OnDevices, Told
from jprune.cli.flags import Flags, Word
from jprune.errors import JpruneError
from jprune.pipeline.options import Asking


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalTasks(OnDevices):
    """Accuracy on tasks of lm-evaluation-harness (`pip install jprune[eval]`), with its standard errors."""

    tasks: str
    """Names of tasks, separated by commas: arc_easy,hellaswag,piqa. `lm-eval ls tasks` lists them."""
    asking: Annotated[Asking, Flags(words={"example_seed": Word(flag="seed")})]
    dtype: str | None = None
    """Dtype of the activations: float32, bfloat16 or float16. By default float32 on CPU and
    for float16 weights, else that of the weights."""

    def run(self) -> Told:
        """Measures."""
        check_harness()
        from jprune.checkpoints import load
        from jprune.checkpoints.dtypes import activation_dtype
        from jprune.pipeline.tasks import Model, evaluate
        from jprune.runs.report import Progress

        names = task_names(self.tasks)
        checkpoint = load(self.model)
        with display.progress() as show:
            model = Model(
                checkpoint,
                dtype=activation_dtype(checkpoint, self.dtype),
                mesh=self.mesh(),
                progress=lambda done, total: show(Progress(float(done), total, self.tasks, "tasks")),
            )
            found = evaluate(model, names, self.asking)
        return Told({"model": self.model, **_plain(found)}, show=functools.partial(_show, found))


def task_names(text: str) -> list[str]:
    """Names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_harness() -> None:
    """Raises a `JpruneError` where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise JpruneError("tasks need lm-evaluation-harness, which is not installed; `pip install 'jprune[eval]'`")


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
