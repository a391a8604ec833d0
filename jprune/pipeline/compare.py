"""Models side by side: what each is, what it predicts, and how far that is from the first of them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import paths, trees
from jprune.anatomy.kernels import prunable
from jprune.checkpoints import Checkpoint, load
from jprune.checkpoints.packed.layout import weight_files
from jprune.data.for_model import evaluation_windows
from jprune.data.windows import Windows
from jprune.errors import JpruneError
from jprune.evaluate import intervals
from jprune.evaluate.distance import Distance, Reference
from jprune.evaluate.flips import Flips, flips
from jprune.evaluate.intervals import Interval
from jprune.models.generate import check_prompt, stream
from jprune.pipeline.options import Asking

CONTINUED = 48
TAIL = 99
"""Percentile of the tokens' divergences that is told beside their mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One of the models.

    Attributes:
        model: as it was given.
        sparsity: zeros of its prunable kernels, and parameters.
        kernels: of each of them the path, zeros and elements.
        layers: the sizes of every layer by name.
        nbytes: of its parameters, in the dtypes in which they are stored; of a packed folder, of its files.
        perplexity: exp of the mean cross-entropy, with its interval over windows.
        change: of the mean cross-entropy from the reference's, in nats, by windows in pairs; its `exp` is the ratio of
            the perplexities. Zero for the reference.
        divergence: KL(reference || model) of a token, in nats, with its interval over windows.
        tail: the percentile `TAIL` of the tokens' divergences.
        agreement: share of tokens whose most likely successor is the reference's, with its interval over windows.
    """

    model: str
    sparsity: trees.Sparsity
    kernels: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, int], ...]
    nbytes: int
    perplexity: Interval
    change: Interval
    divergence: Interval
    tail: float
    agreement: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the models answer to the items of a task.

    Attributes:
        task: its name.
        metric: what says of each item whether it is right.
        filter: what of the harness goes over the answers before.
        items: how many.
        models: of each its answers beside those of the first.
    """

    task: str
    metric: str
    filter: str
    items: int
    models: tuple[Flips, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models on the same windows, the reference first."""

    models: tuple[Compared, ...]
    text: str
    windows: int
    sequence_length: int
    sha256: str
    """Of the windows."""
    continuations: tuple[dict[str, Any], ...] = ()
    """Of every prompt, what each model makes of it."""
    tasks: tuple["Task", ...] = ()
    notices: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """As plain values, without the notices; what is not finite is None."""
        return plain({name: value for name, value in dataclasses.asdict(self).items() if name != "notices"})


def compare(
    models: Sequence[str | Path | Checkpoint],
    text: str = "pydoc",
    *,
    sequence_length: int | None = None,
    windows: int | None = None,
    prompts: Sequence[str] = (),
    tasks: Sequence[str] = (),
    asking: Asking | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Holds models against the first of them, block by block, so that none has to fit into memory.

    Args:
        models: two or more, as `jprune.load` takes them, or loaded; the first is the reference.
        text: the evaluation text, see `jprune.data.sources`.
        sequence_length: tokens a window; by default 2048, or the reference's context.
        windows: how many, from the beginning of the text; by default all.
        prompts: texts that each model continues by `CONTINUED` tokens, the likeliest each time; for these one model
            after the other is in memory as a whole.
        tasks: of lm-evaluation-harness, whose items all models answer; it must be installed.
        asking: how they are asked; by default as each task says, all items.
        dtype: of parameters and hidden states in the computation.
        mesh: the devices, see `jprune.devices`; by default all of them.
        progress: called with (done, total, model) after each block of each.

    Raises:
        JpruneError: there are fewer than two models, they do not cut the text into the same tokens, or one of them
            gives what is not finite.
    """
    if len(models) < 2:
        raise JpruneError(f"expected two models or more to compare, got {len(models)}")
    names = [m.source if isinstance(m, Checkpoint) else str(m) for m in models]
    loaded = [m if isinstance(m, Checkpoint) else load(m) for m in models]
    wanted = {"length": sequence_length, "count": windows}
    tokens = evaluation_windows(loaded[0], text, **wanted)
    wanted = {"length": tokens.tokens.shape[1], "count": windows}
    for name, checkpoint in zip(names[1:], loaded[1:]):
        theirs = evaluation_windows(checkpoint, text, **wanted)
        if theirs.sha256 != tokens.sha256:
            raise JpruneError(
                f"expected models that cut {text} into the same tokens, and {name} does not as {names[0]} does: what "
                "they predict cannot be held against each other; measure each by `jprune eval perplexity`"
            )
    pairs = list(zip(names, loaded))
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "progress": progress}
    answered, told = _answered(pairs, tasks, asking or Asking(), **options) if tasks else ((), ())
    found = held_against(pairs, tokens, prompts=prompts, **options)
    return dataclasses.replace(found, tasks=answered, notices=(*found.notices, *told))


def held_against(
    models: Sequence[tuple[str, Checkpoint]],
    tokens: Windows,
    *,
    prompts: Sequence[str] = (),
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Holds models of one tokenizer, each with what it is called, against the first; the rest is as of `compare`."""
    given = [
        _given(name, checkpoint, prompts) for name, checkpoint in models
    ]  # what they cannot continue is said first
    tell = functools.partial(_told, models, progress)
    reference = Reference(models[0][1], tokens.tokens, dtype=dtype, mesh=mesh, progress=tell(0))
    first = reference.to_itself()
    found = [compared(*models[0], first, first)]
    for i, (name, checkpoint) in enumerate(models[1:], 1):
        found.append(compared(name, checkpoint, reference.to(checkpoint, progress=tell(i)), first))
    count, length = tokens.tokens.shape
    return Comparison(
        models=tuple(found),
        text=tokens.source,
        windows=count,
        sequence_length=length,
        sha256=tokens.sha256,
        continuations=_continued(models, prompts, given),
        notices=(*tokens.notices, *intervals.few(count)),
    )


def _told(
    models: Sequence[tuple[str, Checkpoint]], progress: Callable[[int, int, str], None] | None, index: int
) -> Callable[[int, int], None]:
    """Tells of one of the models how far all are."""

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(index * total + done, len(models) * total, models[index][0])

    return told


def _answered(
    models: Sequence[tuple[str, Checkpoint]],
    tasks: Sequence[str],
    asking: Asking,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[tuple[Task, ...], tuple[str, ...]]:
    """What the models answer to the items of tasks, and what is to be told of it."""
    from jprune.pipeline.tasks import Answers, Model, answers  # of a package that is not always there

    found: list[Answers] = []
    for index, (_, checkpoint) in enumerate(models):
        model = Model(checkpoint, dtype=dtype, mesh=mesh, progress=_told(models, progress, index))
        right, without = answers(model, tasks, asking)
        found.append(right)
    told = [f"{task} has no metric that says of each item whether it is right, and is left out" for task in without]
    done = []
    for key, own in found[0].items():
        items = sorted(own)
        if any(items != sorted(other.get(key, ())) for other in found):
            raise JpruneError(f"expected all models to be asked the same items of {key[0]}, and they were not")
        answered = [np.array([other[key][item] for item in items]) for other in found]
        task, metric, filtered = key
        each = tuple(flips(answered[0], other) for other in answered)
        done.append(Task(task=task, metric=metric, filter=filtered, items=len(items), models=each))
    return tuple(done), tuple(told)


def _given(name: str, checkpoint: Checkpoint, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts for a model, which it can continue."""
    if not prompts:
        return []
    if checkpoint.tokenizer is None:
        raise JpruneError(f"{name} has no tokenizer to read prompts; put its tokenizer.json beside the weights")
    given = [list(checkpoint.tokenizer.encode(prompt, add_special_tokens=True)) for prompt in prompts]
    for each in given:
        check_prompt(checkpoint.config, each, CONTINUED)
    return given


def _continued(
    models: Sequence[tuple[str, Checkpoint]], prompts: Sequence[str], given: Sequence[list[list[int]]]
) -> tuple[dict[str, Any], ...]:
    """What each model makes of every prompt; of each model the prompts' tokens are given."""
    written: list[list[str]] = []
    for (_, model), tokens in zip(models, given):
        if not prompts:
            break
        params, tokenizer = model.params(), model.tokenizer
        options: dict[str, Any] = {"max_tokens": CONTINUED, "eos_id": model.eos_token_ids}
        assert tokenizer is not None
        written.append([tokenizer.decode(list(stream(model.config, params, each, **options))) for each in tokens])
    return tuple(
        {"prompt": prompt, "texts": [{"model": n, "text": own[i]} for (n, _), own in zip(models, written)]}
        for i, prompt in enumerate(prompts)
    )


def compared(name: str, checkpoint: Checkpoint, distance: Distance, first: Distance) -> Compared:
    """What is told of a model: what it is, and how far it is from the reference.

    Args:
        name: what it is called.
        checkpoint: the model.
        distance: of it from the reference.
        first: of the reference from itself.
    """
    kernels: list[dict[str, Any]] = [
        {"path": path, "zeros": trees.count_zeros(checkpoint.read(path)), "size": checkpoint.count([path])}
        for path in prunable(checkpoint)
    ]
    sparsity = trees.Sparsity(
        zeros=sum(kernel["zeros"] for kernel in kernels),
        prunable_parameters=sum(kernel["size"] for kernel in kernels),
        total_parameters=checkpoint.parameters,
    )
    return Compared(
        model=name,
        sparsity=sparsity,
        kernels=tuple(kernels),
        layers=checkpoint.sizes,
        nbytes=_nbytes(checkpoint),
        perplexity=_exp(intervals.mean(distance.nll)),
        change=intervals.mean(distance.nll - first.nll),
        divergence=intervals.mean(distance.divergence.mean(axis=1)),
        tail=float(np.percentile(distance.divergence, TAIL)),
        agreement=intervals.mean(distance.agrees.mean(axis=1)),
    )


def _nbytes(checkpoint: Checkpoint) -> int:
    if not checkpoint.is_packed:
        return checkpoint.nbytes
    return sum(file.stat().st_size for file in weight_files(paths.real(checkpoint.source)))


def _exp(interval: Interval) -> Interval:
    return Interval(**{name: math.exp(min(x, 700.0)) for name, x in dataclasses.asdict(interval).items()})


def plain(value: Any) -> Any:
    """As JSON has it: what is not finite is None, and every sequence a list."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
