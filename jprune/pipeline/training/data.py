"""What a run trains on and what it is measured on, read by its options for a model.

The data is one source, or several domains by name (`jprune.pipeline.training.domains`). The model is measured on a
text or on instructions, and the domains on sources named for them or on windows held out of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jprune.checkpoints import Checkpoint, load
from jprune.checkpoints.dtypes import activation_dtype
from jprune.data import mixture, windows
from jprune.data.batches import Batches, Rows
from jprune.data.held_out import overlap
from jprune.data.mixture import Mixture
from jprune.data.training import evaluation_batches, training_batches
from jprune.errors import JpruneError
from jprune.models import loss, stacked
from jprune.models.batching import windows_at_once
from jprune.pipeline.options import DynamicLoading, Evaluation, TrainingData
from jprune.pipeline.training.domains import Domains, mean_loss
from jprune.train import sharding
from jprune.tuning.base import TrainedMethod
from jprune.tuning.weights import read_stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run, and what follows from it."""

    batches: Batches | Mixture
    domains: Domains | None
    """What the batches are a mixture of, if they are one."""
    held_out: Batches | None
    """What the whole is measured on."""
    steps: int
    """Updates."""
    micro_batch: int
    """Windows computed at once."""
    notices: tuple[str, ...]
    """What the user should know of the data, one sentence each."""


def read(
    checkpoint: Checkpoint, method: TrainedMethod, data: TrainingData, evaluation: Evaluation, mesh: Mesh | None
) -> RunData:
    """Reads the data of a run.

    Args:
      checkpoint: the model: its tokenizer, its vocabulary and its context.
      method: how long is trained, and in which batches.
      data: what is trained on.
      evaluation: what is measured on.
      mesh: the devices over which the parameters of a reference model lie.

    Raises:
      JpruneError: a source that cannot be used, too little of it, or options that do not fit together.
    """
    data = _with_length(data, checkpoint)
    domains, held_out = None, None
    batches: Batches | Mixture
    if isinstance(data.data, Mapping):
        domains = _read_domains(checkpoint, method, data, evaluation, mesh)
        batches = domains.mixture
    elif data.proportions is not None or data.dynamic_loading is not None or isinstance(evaluation.evaluate, Mapping):
        raise JpruneError(
            "proportions, dynamic loading and `evaluate` NAME=SOURCE are about domains; give `data` NAME=SOURCE"
        )
    else:
        order = {"batch_size": method.batch_size, "epochs": method.passes, "seed": method.seed}
        batches = _training(data.data, checkpoint, data, **order)
    rows = method.micro_batch or windows_at_once(batches.length)
    if evaluation.evaluate is not None and not isinstance(evaluation.evaluate, Mapping):
        length = evaluation.evaluate_length
        if length is None:
            length = checkpoint.suggested.evaluation_length
        held_out = _measured(evaluation.evaluate, checkpoint, data, evaluation, batch_size=rows, length=length)
    return RunData(
        batches=batches,
        domains=domains,
        held_out=held_out,
        steps=method.steps or batches.per_epoch * (method.passes or 1),
        micro_batch=rows,
        notices=(*(domains.notices if domains else ()), *_notices(batches, held_out)),
    )


def _with_length(data: TrainingData, checkpoint: Checkpoint) -> TrainingData:
    """The options with the length of windows that the model suggests, if the user says none and the data has none."""
    sources = data.data.values() if isinstance(data.data, Mapping) else [data.data]
    if data.sequence_length is not None or all(map(windows.is_rows, sources)):
        return data
    return dataclasses.replace(data, sequence_length=checkpoint.suggested.training_length)


def _training(spec: windows.Spec, checkpoint: Checkpoint, data: TrainingData, **order: Any) -> Batches:
    """The batches of one source."""
    return training_batches(
        spec,
        checkpoint,
        length=data.sequence_length,
        windows_at_most=data.windows_at_most,
        train_on_prompt=data.train_on_prompt,
        **order,
    )


def _measured(
    spec: windows.Spec,
    checkpoint: Checkpoint,
    data: TrainingData,
    evaluation: Evaluation,
    *,
    batch_size: int,
    length: int | None,
) -> Batches:
    """The windows of a source to measure on; rows of token ids have a length of their own."""
    return evaluation_batches(
        spec,
        checkpoint,
        batch_size=batch_size,
        length=None if windows.is_rows(spec) else length,
        windows_at_most=evaluation.evaluate_windows,
        train_on_prompt=data.train_on_prompt,
    )


def _read_domains(
    checkpoint: Checkpoint, method: TrainedMethod, data: TrainingData, evaluation: Evaluation, mesh: Mesh | None
) -> Domains:
    """All domains. Those that no source is named for are measured on windows of their own."""
    assert isinstance(data.data, Mapping)
    given = evaluation.evaluate if isinstance(evaluation.evaluate, Mapping) else {}
    loading = data.dynamic_loading
    mixture.check_known("`evaluate`", given, data.data)
    reference_losses = None if loading is None else loading.reference_losses
    for what, values in (("proportions", data.proportions), ("reference losses", reference_losses)):
        if values is not None:  # before anything is tokenised
            mixture.check_names(what, values, data.data)
    domains, held_out, notices = {}, {}, []
    for name, spec in data.data.items():
        try:
            domains[name], held_out[name] = _domain(spec, given.get(name), checkpoint, data, evaluation)
        except JpruneError as error:
            raise JpruneError(f"domain {name!r}: {error}") from error
        notices += [*domains[name].notices, *held_out[name].notices]
        if shared := overlap(domains[name], held_out[name]):
            notices.append(
                f"domain {name!r}: {100 * shared:.0f} % of the windows that its loss is measured on share text with "
                "its training data"
            )
    mix = Mixture(domains=domains, batch_size=method.batch_size, proportions=data.proportions, seed=method.seed)
    references, reference = _references(loading, checkpoint, held_out, mesh)
    return Domains(
        mixture=mix,
        held_out=held_out,
        loading=loading,
        references=references,
        reference=reference,
        notices=tuple(dict.fromkeys(notices)),
    )


def _domain(
    spec: windows.Spec,
    measured: windows.Spec | None,
    checkpoint: Checkpoint,
    data: TrainingData,
    evaluation: Evaluation,
) -> tuple[Batches, Batches]:
    """One domain to train on, and what its loss is measured on: a source, or windows held out of its own."""
    domain = _training(spec, checkpoint, data, batch_size=1)  # a domain may have fewer windows than a batch
    rows = windows_at_once(domain.length)
    if measured is None:
        return mixture.hold_out(domain, evaluation.evaluate_windows, batch_size=rows)
    length = evaluation.evaluate_length or domain.length
    return domain, _measured(measured, checkpoint, data, evaluation, batch_size=rows, length=length)


def _references(
    loading: DynamicLoading | None, checkpoint: Checkpoint, held_out: Mapping[str, Batches], mesh: Mesh | None
) -> tuple[dict[str, float], Checkpoint | None]:
    """The reference loss of every domain, given or measured of a model; and that model."""
    if loading is None:
        return {}, None
    if loading.reference is None:
        return {name: float(value) for name, value in (loading.reference_losses or {}).items()}, None
    model = load(loading.reference)
    if model.config.vocab != checkpoint.config.vocab:
        raise JpruneError(
            f"the vocabulary of the reference model {model.source} has {model.config.vocab} tokens and the model's "
            f"{checkpoint.config.vocab}: their losses cannot be compared; give `reference_losses`"
        )
    language_model = loss.causal_lm(model.config)
    dtype = activation_dtype(model, None)
    params = sharding.put(read_stacked(model, stacked.runs(model.config, model.shapes), dtype=dtype), mesh)
    measure = mean_loss(lambda trainable, frozen, batch: language_model(trainable, batch), mesh)
    return {name: measure(batches, params, {}) for name, batches in held_out.items()}, model


def _notices(batches: Batches | Mixture, held_out: Batches | None) -> tuple[str, ...]:
    """What the user should know of the data and of what the whole is measured on."""
    notices = [*batches.notices, *(held_out.notices if held_out else ())]
    if held_out is not None:
        if shared := overlap(batches, held_out):
            notices.append(
                f"{100 * shared:.0f} % of the evaluation windows share text with the training data: what is measured "
                "on them is no evidence"
            )
        if not isinstance(held_out.examples, Rows):
            notices.append(f"{held_out.source} is instruction data: its loss is measured, and no perplexity of text")
    return tuple(dict.fromkeys(notices))
