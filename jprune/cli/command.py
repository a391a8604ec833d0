"""What the commands have in common: dataclasses whose fields are their options, and whose `run` does the job."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from jprune.errors import UsageError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jprune.pipeline.options import Evaluation
    from jprune.runs.report import RunReport


@dataclasses.dataclass(frozen=True)
class Told:
    """What a command has to say."""

    json: Mapping[str, Any]
    """The object that `--json` prints."""
    notices: tuple[str, ...] = ()
    """What the user should know, for stderr."""
    show: Callable[[], None] = lambda: None
    """Prints the result for people."""
    status: int = 0
    """The exit status."""


def command_line() -> str:
    """The words that this process was started with, as a shell takes them."""
    return shlex.join(["jprune", *sys.argv[1:]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has."""

    model: tyro.conf.Positional[str]
    """Hugging Face hub id, local folder, .safetensors or .gguf file, Orbax folder, or "demo", which is
    SmolLM2-135M-Instruct."""
    json: bool = False
    """Make the last line of stdout one JSON object, and print nothing else there."""

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """What must surround `run`."""
        yield

    def spelled(self, text: str) -> str:
        """A text of the library in the words of the command line."""
        from jprune.cli.flags import Form
        from jprune.cli.words import WORDS

        return Form(type(self), WORDS).spelled(text)

    def run(self) -> Told:
        """Does the job."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnText(Command):
    """What every command has that measures models on a text."""

    text: str = "pydoc"
    """Evaluation text: pydoc, a text file, .jsonl, .jsonl.gz, .parquet, .npy of token ids, or hf:DATASET."""
    sequence_length: int | None = None
    """Tokens of an evaluation window. By default 2048 or the model's context."""
    windows: int | None = None
    """Number of evaluation windows, from the beginning of the text. By default all."""
    dtype: str | None = None
    """Dtype of the activations: float32, bfloat16 or float16. By default float32 on CPU and
    for float16 weights, else that of the weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnMesh(Command):
    """What every command has that runs on several devices."""

    model_axis: int = 1
    """Devices that share out the outputs of every kernel; the windows of text are shared out among the others."""

    def mesh(self) -> "Mesh":
        """The devices of all processes."""
        from jprune import devices

        return devices.make_mesh(self.model_axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDevices(OnMesh):
    """What every command has that runs on several devices, and in several processes."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes run together; each is given the same command."""
    process_id: int | None = None
    """Number of this process, from 0."""
    num_processes: int | None = None
    """Number of processes that run together."""
    distributed: bool = False
    """Let JAX find coordinator and processes itself, as it can under SLURM, on TPU pods and on GKE."""

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Joins the other processes; of them only the first prints."""
        from jprune.runs import processes

        cluster = processes.Cluster(
            coordinator=self.coordinator, process_id=self.process_id, num_processes=self.num_processes
        )
        if self.distributed and self.coordinator:
            raise UsageError("--distributed lets JAX find the coordinator, so give it or --coordinator, not both")
        if not (self.distributed or self.coordinator):
            yield
            return
        cluster.start()
        with processes.only_first_speaks():
            yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByRecipe(Command):
    """What every command has that prunes or trains."""

    recipe: Path | None = None
    """TOML or JSON file with options, or the jprune.json of an earlier run; the command line counts more."""
    report: bool = False
    """Hold the result against the model that it was made from, on the text of `evaluate` or else pydoc, and write
    OUT/report.html about it."""

    def told(
        self, result: "RunReport", measured: "Evaluation", show: Callable[[], None], mesh: "Mesh | None" = None
    ) -> Told:
        """What there is to say of a run that has ended; and its page, if there is to be one.

        Args:
          result: what the run says of itself.
          measured: the text that it was measured on.
          show: prints it for people.
          mesh: the devices that it ran on; by default all of them.
        """
        if not self.report:
            return Told(result.json(), result.notices, show)
        from jprune.cli import display
        from jprune.pipeline.page import report_of_run
        from jprune.runs.report import Progress

        with display.progress() as progress:
            page, notices = report_of_run(
                self.model,
                result.out,
                measured,
                command=command_line(),
                mesh=mesh,
                progress=lambda done, total, model: progress(Progress(float(done), total, model, "report")),
            )

        def shown() -> None:
            show()
            if page is not None:
                print(f"its report is {page}")

        json = {**result.json(), "report": None if page is None else str(page)}
        return Told(json, (*result.notices, *notices), shown)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planning(ByRecipe):
    """What every command has that can say beforehand what it would do."""

    out: Path | None = None
    """Folder of the result; it appears when everything is done."""
    plan: bool = False
    """Print what would be done and what comes out, and touch nothing."""

    def destination(self) -> Path:
        """The folder of the result.

        Raises:
          UsageError: none is given.
        """
        if self.out is None:
            raise UsageError("give --out DIR for the result (or --plan to see what would be done)")
        return self.out
