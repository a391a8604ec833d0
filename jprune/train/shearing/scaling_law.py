"""Reference losses by extrapolation: what a model of a given size would reach on a domain, from those of larger ones.

    loss(N, D) = E + A / N^alpha + B / D^beta

N is the number of parameters, D that of the tokens trained on (Hoffmann et al., *Training Compute-Optimal Large
Language Models*, arXiv:2203.15556, section 3.3). Constants are fitted as there: the Huber loss (delta 1e-3) of the
differences of log losses, from many starting points, of which the best end counts; alpha and beta within (0, 2].

LLM-Shearing (arXiv:2310.06694, appendix A) fits one law for each domain to the models of a family, which have all seen
the same number of tokens. D then tells nothing, its term is part of E, and three models determine the three constants.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from jprune.annotations import Float64
from jprune.errors import JpruneError

HUBER = 1e-3
EXPONENTS = (0.1, 0.3, 0.6, 1.2)
"""Starting points."""
LARGEST_EXPONENT = 2.0


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The constants of a law; see the module. `b` is 0 where the number of tokens did not vary."""

    e: float
    a: float
    alpha: float
    b: float = 0.0
    beta: float = 0.0

    def predict(self, parameters: float, tokens: float | None = None) -> float:
        """The loss, in nats a token, of a model of a size after training on a number of tokens.

        Raises:
          JpruneError: the law depends on the number of tokens, and it is not given.
        """
        if self.b and tokens is None:
            raise JpruneError("this scaling law depends on the number of tokens trained on; give it too")
        data = self.b / float(tokens) ** self.beta if self.b and tokens else 0.0
        return self.e + self.a / float(parameters) ** self.alpha + data


def fit(parameters: list[float], losses: list[float], tokens: list[float] | None = None) -> ScalingLaw:
    """The law that fits best.

    Args:
      parameters: of each model.
      losses: what each reaches, in nats.
      tokens: how many each was trained on; without it, equally many.

    Raises:
      JpruneError: lists of different lengths, numbers that are not above 0, or too few: three models of different size
        are needed, and with tokens five, of which at least two have seen different numbers of them.
    """
    columns = {"parameters": parameters, "losses": losses, **({} if tokens is None else {"tokens": tokens})}
    values = {name: np.array(column, np.float64) for name, column in columns.items()}
    _check(values)
    # In units of their geometric means, so that all constants are of the size of a loss.
    units = {name: float(np.exp(np.log(x).mean())) for name, x in values.items() if name != "losses"}
    sizes = [np.log(values[name] / unit) for name, unit in units.items()]
    terms, exponents = _fit(sizes, np.log(values["losses"]))
    factors = [term * unit**exponent for term, unit, exponent in zip(terms[1:], units.values(), exponents)]
    data = {} if tokens is None else {"b": factors[1], "beta": exponents[1]}
    return ScalingLaw(e=terms[0], a=factors[0], alpha=exponents[0], **data)


def _fit(
    sizes: list[Float64[np.ndarray, "n"]], log_losses: Float64[np.ndarray, "n"]
) -> tuple[list[float], list[float]]:
    """The constants (E and one for each size) and the exponents (one for each size), for logarithms of sizes."""
    from scipy.optimize import least_squares, nnls

    k = len(sizes)

    def residuals(x: Float64[np.ndarray, "p"]) -> Float64[np.ndarray, "n"]:
        terms = [x[1 + i] - x[1 + k + i] * size for i, size in enumerate(sizes)]
        return np.logaddexp.reduce([np.full_like(log_losses, x[0]), *terms], axis=0) - log_losses

    best = None
    for start in itertools.product(EXPONENTS, repeat=k):
        # For given exponents the losses are linear in the constants, which are not negative.
        columns = [np.ones_like(log_losses), *(np.exp(-exponent * size) for exponent, size in zip(start, sizes))]
        constants, _ = nnls(np.stack(columns, axis=1), np.exp(log_losses))
        x = [*np.log(np.maximum(constants, 1e-6)), *start]
        bounds = ([-np.inf] * (1 + k) + [1e-6] * k, [np.inf] * (1 + k) + [LARGEST_EXPONENT] * k)
        found = least_squares(
            residuals, x, bounds=bounds, loss="huber", f_scale=HUBER, x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return np.exp(best.x[: 1 + k]).tolist(), best.x[1 + k :].tolist()


def _check(values: dict[str, Float64[np.ndarray, "n"]]) -> None:
    count = len(values["losses"])
    for name, x in values.items():
        if len(x) != count:
            raise JpruneError(f"a scaling law needs as many {name} as losses; there are {len(x)} and {count}")
        if not (np.isfinite(x) & (x > 0)).all():
            raise JpruneError(f"a scaling law needs {name} above 0; found {x.tolist()}")
    different = len(np.unique(values["parameters"]))
    needed = 5 if "tokens" in values else 3
    if count < needed or different < 3:
        raise JpruneError(
            f"a scaling law needs the losses of at least {needed} models, of at least 3 sizes; there are {count} of "
            f"{different} sizes"
        )
    if "tokens" in values and len(np.unique(values["tokens"])) < 2:
        raise JpruneError("all models have seen equally many tokens, which tells nothing of them; leave tokens out")
