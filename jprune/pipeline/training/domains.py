"""Training on several domains: their windows, their held-out losses, and weights that follow the losses.

With the domains' losses measured every so many steps, their weights either stay as they are or follow by dynamic
loading (`jprune.train.shearing.dynamic_loading`). Measured are windows that the training does not see: of a source that
is named for it, or held out of the domain's own. The loss of the whole is the mean of the domains' by the proportions
that the run began with, which are what the user wants the model to be good at.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jprune.checkpoints import Checkpoint, load
from jprune.checkpoints.dtypes import activation_dtype
from jprune.data import mixture, windows
from jprune.data.batches import Batches
from jprune.data.held_out import overlap
from jprune.data.mixture import Mixture
from jprune.data.training import evaluation_batches, training_batches
from jprune.errors import JpruneError
from jprune.models import loss, stacked
from jprune.models.batching import windows_at_once
from jprune.pipeline.options import DynamicLoading as DynamicLoading
from jprune.train import loop, sharding
from jprune.tuning.recovery import read_stacked

PyTree = Any
Evaluation = Callable[[PyTree, PyTree, loop.Batch], tuple[jax.Array, jax.Array]]
"""(trainable, frozen, batch) -> sum of weighted losses, and of the weights."""
Watch = Callable[[PyTree, PyTree], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domains:
    """The data of a run."""

    mixture: Mixture
    held_out: Mapping[str, Batches]
    """By domain, what its loss is measured on."""
    loading: DynamicLoading | None
    """None leaves the weights as they are."""
    references: Mapping[str, float]
    """The reference loss of every domain, where there is dynamic loading."""
    reference: Checkpoint | None
    """Of which they were measured."""
    notices: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on besides the mixture's fingerprint, as JSON."""
        return {
            "proportions": self.mixture.initial,
            "held_out": {name: batches.sha256 for name, batches in self.held_out.items()},
            "dynamic_loading": self.loading and dataclasses.asdict(self.loading),
            "reference": self.reference and self.reference.fingerprint(),
        }

    def described(self, history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What the record of a result says of each domain, after the training that the metrics are of."""
        result = {}
        for name, domain in self.mixture.domains.items():
            losses = [line[f"domain_loss/{name}"] for line in history if f"domain_loss/{name}" in line]
            result[name] = {
                "source": domain.source,
                "windows": domain.windows,
                "held_out": self.held_out[name].windows,
                "sha256": domain.sha256,
                "weight": {"first": self.mixture.initial[name], "last": history[-1][f"domain_weight/{name}"]},
                "epochs": history[-1][f"domain_epochs/{name}"],
                "loss": {"first": losses[0], "last": losses[-1]},
                "reference_loss": self.references.get(name),
            }
        return result

    def repeated(self, history: list[dict[str, Any]]) -> tuple[str, ...]:
        """A notice for every domain whose windows were not enough."""
        return tuple(
            f"domain {name!r}: its {found['windows']} windows were gone through {found['epochs']:.1f} times"
            for name, found in self.described(history).items()
            if found["epochs"] > 1
        )


def read(
    data: Mapping[str, windows.Spec],
    checkpoint: Checkpoint,
    *,
    batch_size: int,
    proportions: Mapping[str, int | float] | None = None,
    length: int | None = None,
    windows_at_most: int | None = None,
    seed: int = 0,
    train_on_prompt: bool = False,
    loading: DynamicLoading | None = None,
    evaluate: Mapping[str, windows.Spec] | None = None,
    evaluate_windows: int | None = None,
    evaluate_length: int | None = None,
    mesh: Mesh | None = None,
) -> Domains:
    """Reads the domains.

    Args:
      data: the source of each, by name.
      checkpoint: the model: its tokenizer, its vocabulary and its context.
      batch_size: windows a batch.
      proportions: see `Mixture`.
      length: tokens a window; see `training_batches`, also for `train_on_prompt`.
      windows_at_most: take only the first so many of each domain.
      seed: of the order.
      train_on_prompt: of instructions.
      loading: the references are looked up, or measured on the windows held out.
      evaluate: sources to measure them on; of a domain that is not named there, windows are held out.
      evaluate_windows: of each domain; by default one in 20 is held out, at most 256, and of sources all are taken.
      evaluate_length: tokens a window of `evaluate`; by default as many as in training.
      mesh: where a reference model's parameters lie.

    Raises:
      JpruneError: a source that cannot be used, an empty domain, or names that do not fit together.
    """
    evaluate = evaluate or {}
    mixture.check_known("--evaluate", evaluate, data)
    reference_losses = None if loading is None else loading.reference_losses
    for what, values in [("proportions", proportions), ("reference losses", reference_losses)]:
        if values is not None:  # before anything is tokenised
            mixture.check_names(what, values, data)
    domains: dict[str, Batches] = {}
    held_out: dict[str, Batches] = {}
    notices: list[str] = []
    for name, spec in data.items():
        try:
            domains[name] = training_batches(
                spec,
                checkpoint,
                batch_size=1,  # a domain may have fewer windows than a batch
                length=length,
                windows_at_most=windows_at_most,
                train_on_prompt=train_on_prompt,
            )
            rows = windows_at_once(domains[name].length)
            if name in evaluate:
                held_out[name] = evaluation_batches(
                    evaluate[name],
                    checkpoint,
                    batch_size=rows,
                    length=None if windows.is_rows(evaluate[name]) else evaluate_length or domains[name].length,
                    windows_at_most=evaluate_windows,
                    train_on_prompt=train_on_prompt,
                )
            else:
                domains[name], held_out[name] = mixture.hold_out(domains[name], evaluate_windows, batch_size=rows)
        except JpruneError as error:
            raise JpruneError(f"domain {name!r}: {error}") from error
        notices += [*domains[name].notices, *held_out[name].notices]
        if shared := overlap(domains[name], held_out[name]):
            notices.append(
                f"domain {name!r}: {100 * shared:.0f} % of the windows that its loss is measured on share text with "
                "its training data"
            )
    mix = Mixture(domains=domains, batch_size=batch_size, proportions=proportions, seed=seed)
    reference = None if loading is None or loading.reference is None else load(loading.reference)
    references = {name: float(value) for name, value in (reference_losses or {}).items()}
    if reference is not None:
        references = _measured(reference, checkpoint, held_out, mesh)
    return Domains(
        mixture=mix,
        held_out=held_out,
        loading=loading,
        references=references,
        reference=reference,
        notices=tuple(dict.fromkeys(notices)),
    )


def _measured(
    model: Checkpoint, checkpoint: Checkpoint, held_out: Mapping[str, Batches], mesh: Mesh | None
) -> dict[str, float]:
    """The losses of a reference model."""
    if model.config.vocab != checkpoint.config.vocab:
        raise JpruneError(
            f"the vocabulary of the reference model {model.source} has {model.config.vocab} tokens and the model's "
            f"{checkpoint.config.vocab}: their losses cannot be compared; give --reference-loss"
        )
    language_model = loss.causal_lm(model.config)
    dtype = activation_dtype(model, None)
    params = sharding.put(read_stacked(model, stacked.runs(model.config, model.shapes), dtype=dtype), mesh)
    measure = mean_loss(lambda trainable, frozen, batch: language_model(trainable, batch), mesh)
    return {name: measure(batches, params, {}) for name, batches in held_out.items()}


def mean_loss(evaluation: Evaluation, mesh: Mesh | None) -> Callable[[Batches, PyTree, PyTree], float]:
    """(batches, trainable, frozen) -> mean loss in nats over all their windows; compiled once for equal shapes."""
    f = jax.jit(evaluation)

    def mean(batches: Batches, trainable: PyTree, frozen: PyTree) -> float:
        total = weight = 0.0
        for batch in batches:
            for part in loop.micro_batches(batch, None, mesh):
                sums = f(trainable, frozen, part)
                total, weight = total + float(sums[0]), weight + float(sums[1])
        return total / max(weight, 1.0)

    return mean


class Balance:
    """Measures the domains' losses for the training loop, and sets the weights of its stream by them.

    The run takes its batches from `stream`. The weights are the stream's own, so they are saved and restored with its
    place.

    Args:
      domains: see `read`.
      evaluation: the model's loss.
      mesh: where the parameters lie.
      watch: what else the metrics say.
    """

    def __init__(self, domains: Domains, evaluation: Evaluation, mesh: Mesh | None, watch: Watch | None = None):
        self._domains, self._watch = domains, watch
        self.stream = iter(domains.mixture)
        self._mean = mean_loss(evaluation, mesh)
        self._measured: dict[str, float] = {}

    def evaluate(self, trainable: PyTree, frozen: PyTree) -> float:
        """The loop's `evaluate`: the mean of the domains' losses by their first proportions; sets the weights."""
        domains, stream = self._domains, self.stream
        losses = {name: self._mean(batches, trainable, frozen) for name, batches in domains.held_out.items()}
        if domains.loading is not None:
            stream.weights = domains.loading.reweighing(stream.weights, losses, dict(domains.references))
        self._measured = losses
        return sum(share * losses[name] for name, share in domains.mixture.initial.items())

    def watch(self, trainable: PyTree, state: PyTree) -> dict[str, Any]:
        """The loop's `watch`: weights and epochs of the domains, and their losses where they were measured just now."""
        line = {} if self._watch is None else dict(self._watch(trainable, state))
        line |= {f"domain_weight/{name}": weight for name, weight in self.stream.weights.items()}
        line |= {f"domain_epochs/{name}": round(epochs, 4) for name, epochs in self.stream.epochs.items()}
        line |= {f"domain_loss/{name}": loss for name, loss in self._measured.items()}
        self._measured = {}
        return line
