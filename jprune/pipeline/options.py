"""The options of runs, by subject. Each stands once, here, with its words.

The command line, the functions of Python, recipe files and the records of results all read these classes. They travel
whole: a run takes them as they are, and asks them for what follows from them for a model. `sorted_into` makes them of
the keywords of a call, and `fields_of` makes keywords of them.

Field docstrings are the help of the command line, which makes flags of `names` in backquotes.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jprune.checkpoints import Checkpoint
from jprune.checkpoints.formats import Format
from jprune.data.for_model import evaluation_windows
from jprune.data.windows import Spec, Windows, is_rows
from jprune.errors import JpruneError, UnknownOption
from jprune.patterns import Pattern
from jprune.train.shearing.dynamic_loading import Reweighing

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """The text that a method calibrates on."""

    calibration: Spec | Mapping[str, Spec] = "pydoc"
    """Calibration text: pydoc, a text file, .jsonl, .jsonl.gz, .parquet, .npy of token ids, or hf:DATASET; records of
    messages are put into the model's chat template. NAME=SOURCE,NAME=SOURCE mixes several. In Python also token windows
    [n, length]."""
    calibration_proportions: Mapping[str, int | float] | None = None
    """Weights of the sources that are mixed. By default they are equal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(CalibrationText):
    """The windows of it."""

    samples: int | None = None
    """Calibration windows. By default 128, or 16 for the demo model."""
    sequence_length: int | None = None
    """Tokens of a calibration window. By default 2048 or the model's context, or 512 for the demo model."""
    seed: int = 0
    """Seed of the choice of calibration windows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which kernels are pruned, and to which patterns."""

    where: tuple[str, ...] = ()
    """Regular expression over kernel paths; prune only what one of them finds. By default all kernels of the decoder
    blocks. Single experts have paths too, such as blocks/3/mlp/experts/5/up/kernel."""
    skip: tuple[str, ...] = ()
    """Regular expression over kernel paths; leave alone what one of them finds."""
    overrides: Mapping[str, Pattern] = dataclasses.field(default_factory=dict)
    """Another pattern for the kernels that a regular expression finds; the last one that finds a kernel counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The text that a model is measured on before and after."""

    evaluate: Spec | Mapping[str, Spec] | None = None
    """Text whose perplexity is measured before and after, named as for calibration. Runs that train also take
    instructions, or sources by domain."""
    evaluate_length: int | None = None
    """Tokens of an evaluation window. By default 2048 or the model's context, or 512 for the demo model."""
    evaluate_windows: int | None = None
    """Number of evaluation windows, from the beginning of the text; by default all, or 16 where the demo model is
    pruned. Of domains, the number that is held out of each; by default one in 20, at most 256."""

    def text(self, checkpoint: Checkpoint, *, length: int | None = None) -> Windows | None:
        """The windows of one text to measure a model on; None if there is nothing to measure.

        Args:
          checkpoint: the model.
          length: tokens of a window of text if `evaluate_length` does not say; by default what the checkpoint suggests.

        Raises:
          JpruneError: sources by domain, which are for training; a text that cannot be read, or too little of it.
        """
        source = self.evaluate
        if source is None:
            return None
        if isinstance(source, Mapping):
            raise JpruneError(f"only training is measured by domain, and there are {len(source)}; give one source")
        count = self.evaluate_windows
        if self.evaluate_length is not None:
            length = self.evaluate_length
        elif is_rows(source):
            length = None  # rows have a length of their own
        else:
            length = checkpoint.suggested.evaluation_length if length is None else length
            count = checkpoint.suggested.evaluation_windows if count is None else count
        return evaluation_windows(checkpoint, source, length=length, count=count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How models are asked the items of tasks."""

    fewshot: int | None = None
    """Examples before each question. By default what each task says."""
    limit: int | None = None
    """Items of each task, from the beginning. By default all."""
    include: Path | None = None
    """Folder with tasks of your own, as lm-evaluation-harness writes them (YAML)."""
    chat: bool = False
    """Put the questions to the model in its chat template, as instruction models expect them."""
    example_seed: int = 0
    """Seed of the examples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The folder of the result, and what becomes of an earlier one."""

    format: Format | None = None
    """Output format: hf (safetensors, for every Hugging Face loader; all layers must be equal), jprune (the same, and
    layers may differ), decilm (DeciLMForCausalLM, for vLLM), orbax or packed (without the zeros, for jprune). By
    default hf, or jprune if layers differ."""
    overwrite: bool = False
    """Replace the output folder if an earlier run wrote it; without `resume`, drop a run that was interrupted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Output):
    """The folder of the result of a run that can be interrupted and gone on with."""

    resume: bool = False
    """Go on with a run that was interrupted, which is in OUT.run, to the same result; begin if there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicLoading:
    """What the losses of domains are compared with, and how the domains' weights follow them."""

    reference_losses: Mapping[str, int | float] | None = None
    """Reference loss of every domain in nats a token: given, or predicted (`jprune.train.shearing.scaling_law`)."""
    reference: str | None = None
    """Model whose losses on the held-out windows are the references, instead."""
    reweighing: Reweighing = dataclasses.field(default_factory=Reweighing)
    """Step size, smoothing and clipping of the update of the weights."""

    def __post_init__(self) -> None:
        if (self.reference_losses is None) == (self.reference is None):
            raise JpruneError(
                "dynamic loading needs either a reference loss for every domain (`reference_losses` NAME=LOSS,...) "
                "or a model to measure them of (`reference` MODEL)"
            )
        for name, value in (self.reference_losses or {}).items():
            if not 0 < value < float("inf"):
                raise JpruneError(f"the reference loss of domain {name!r} must be a number above 0; it is {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The text or instructions that a run trains on, as one source or as domains."""

    data: Spec | Mapping[str, Spec]
    """Training data: pydoc, a text file, .jsonl, .jsonl.gz, .parquet (text, or records of instructions), .npy of token
    ids, or hf:DATASET. Or sources by name, of domains to draw from."""
    proportions: Mapping[str, int | float] | None = None
    """Weights of the domains at the beginning. By default their numbers of windows."""
    dynamic_loading: DynamicLoading | None = None
    """Draw more from domains whose losses lag behind their references, as LLM-Shearing does."""
    sequence_length: int | None = None
    """Tokens of a training window. By default 2048 for text and 256 for instructions, or the model's context (256 for
    the demo model)."""
    windows_at_most: int | None = None
    """Number of windows or records taken from the beginning of the data (of each domain). By default all."""
    train_on_prompt: bool = False
    """Learn the prompts of instructions too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a training run measures and saves itself, and on how many devices it lies."""

    evaluate_every: int | None = None
    """Steps between two measurements of the loss on the evaluation data, or of the domains' losses; the best state
    becomes the result. By default only the last state is measured; with dynamic loading, after each twentieth of the
    steps."""
    checkpoint_every: int | None = None
    """Steps between two saved states of the run. By default a tenth of all steps."""
    fsdp: int = 1
    """Devices over which parameters and optimizer state are cut up; the other devices share out the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What of the machine a run may take."""

    memory: int | None = None
    """Bytes of memory that pruning may take. By default what the process has and three quarters of what is free."""
    micro_batch: int | None = None
    """Calibration windows computed at once on each device. By default as many as are fast."""
    run: str | Path | None = None
    """Folder of what the run needs to be resumed, and of what does not fit into memory. By default OUT.run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """All options of a run that trains, besides its method."""

    data: TrainingData
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    result: Result = dataclasses.field(default_factory=Result)

    @classmethod
    def of(cls, **keywords: Any) -> "TrainOptions":
        """The options from the keywords of a call, which are the names of the parts' fields.

        Raises:
          UnknownOption: a keyword that none of them has.
        """
        data, evaluation, schedule, result = sorted_into(keywords, TrainingData, Evaluation, Schedule, Result)
        return cls(data=data, evaluation=evaluation, schedule=schedule, result=result)


def sorted_into(keywords: Mapping[str, Any], *kinds: type) -> tuple[Any, ...]:
    """The keywords of a call as one object of each class, by the names of its fields.

    Args:
      keywords: field names and values.
      kinds: dataclasses; a field that several have goes to each of them.

    Raises:
      UnknownOption: a keyword that no class has; the nearest that one has is named.
    """
    names = {kind: [field.name for field in dataclasses.fields(kind)] for kind in kinds}
    known = {name for own in names.values() for name in own}
    for keyword in keywords:
        if keyword not in known:
            near = difflib.get_close_matches(keyword, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise UnknownOption(f"unknown option {keyword!r}; {hint}")
    return tuple(kind(**{name: keywords[name] for name in own if name in keywords}) for kind, own in names.items())


def fields_of(*parts: Any) -> dict[str, Any]:
    """The fields of dataclass objects as keywords, not copied; later ones win."""
    return {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}


def part_of(kind: type[T], whole: Any) -> T:
    """The object of one class that another, which has at least its fields, contains."""
    return kind(**{field.name: getattr(whole, field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
