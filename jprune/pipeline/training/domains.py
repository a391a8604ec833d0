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

from jprune.checkpoints import Checkpoint
from jprune.data.batches import Batches
from jprune.data.mixture import Mixture
from jprune.pipeline.options import DynamicLoading as DynamicLoading
from jprune.train import loop

PyTree = Any
Measure = Callable[[PyTree, PyTree, loop.Batch], tuple[jax.Array, jax.Array]]
"""(trainable, frozen, batch) -> sum of weighted losses, and of the weights."""
Watch = Callable[[PyTree, PyTree], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domains:
    """The data of a run, by domain."""

    mixture: Mixture
    held_out: Mapping[str, Batches]
    """What the loss of each domain is measured on."""
    loading: DynamicLoading | None
    """How the weights follow the losses; None leaves them as they are."""
    references: Mapping[str, float]
    """The reference loss of every domain, where there is dynamic loading."""
    reference: Checkpoint | None
    """The model of which they were measured."""
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


def mean_loss(evaluation: Measure, mesh: Mesh | None) -> Callable[[Batches, PyTree, PyTree], float]:
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
      domains: the data (`jprune.pipeline.training.data.read`).
      evaluation: the model's loss.
      mesh: where the parameters lie.
      watch: what else the metrics say.
    """

    def __init__(self, domains: Domains, evaluation: Measure, mesh: Mesh | None, watch: Watch | None = None):
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
