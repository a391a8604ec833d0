"""What runs that train tell when they are done."""

import dataclasses
from typing import Any

from jprune.runs.report import RunReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneReport(RunReport):
    """The result of a training run."""

    method: str
    steps: int
    best_step: int
    """Number of steps after which the parameters are those of the result."""
    trainable_parameters: int
    parameters: int
    """Number of parameters of the whole model before."""
    losses: tuple[float, ...]
    """Training loss of every step, in nats a token."""
    evaluation_losses: dict[int, float]
    """Loss on the evaluation data by step, where it was measured."""
    tokens_per_second: float | None
    resumed_from: int
    """Number of steps that an earlier, interrupted run had done."""
    domains: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Source, windows, weights and losses of every domain, if the data has any; see `Domains.described`."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only this kind of run has."""
        result: dict[str, Any] = {
            "method": self.method,
            "steps": self.steps,
            "best_step": self.best_step,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "loss": {"first": self.losses[0], "last": self.losses[-1]},
            "tokens_per_second": self.tokens_per_second,
            "resumed_from": self.resumed_from,
        }
        if self.evaluation_losses:
            result["evaluation_loss"] = min(self.evaluation_losses.values())
        if self.domains:
            result["domains"] = self.domains
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunedReport(TuneReport):
    """The result of a run that prunes while it trains; `parameters` are those before."""

    parameters_after: int
    sizes: tuple[dict[str, int], ...]
    """Sizes of every layer of the result."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only this kind of run has."""
        return {
            **super().own_json(),
            "parameters": {"before": self.parameters, "after": self.parameters_after},
            "sizes": list(self.sizes),
        }

    def lines(self, change: str) -> tuple[str, ...]:
        """What the command says of the result, a line each; `change` is that of the parameters, in words."""
        return (f"parameters: {change}",)
