"""`auto`: the method and options that measured best, at the cost that one is ready to pay.

What is chosen is an ordinary method with ordinary options: the run, its record and its resumption are those of the
command that is printed. The choices come from `scripts/reproduce_quality.py`; docs/results.md has the table.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from jprune.errors import JpruneError
from jprune.patterns import NM, Unstructured
from jprune.pipeline.registry import name_of

if TYPE_CHECKING:
    from jprune.methods import Method
    from jprune.pipeline.recipe import Recipe

Quality = Literal["fast", "balanced", "best"]

DAMPING = 0.1
"""Where weights are solved for once more, or towards the dense model's outputs. With the usual 0.01 the text of
calibration gains no more, and other texts little or nothing."""
DAMPING_BY_GROUPS = 0.2
"""Of `alps` under N:M, which leaves it less to choose: another text gains, that of calibration stays as it is."""
WHY: dict[Quality, str] = {
    "fast": "the demo model at 60 % has a tenth less perplexity than after sparsegpt on the text of calibration, and a "
    "quarter less on another, for 1.2 times the time",
    "balanced": "the demo model at 60 % has 39 % less perplexity than after sparsegpt on the text of calibration, and "
    "47 % less on another, for 2.7 times the processor time",
    "best": "the demo model at 60 % has 40 % less perplexity than after sparsegpt on the text of calibration, and "
    "42 % less on another, for about five times the processor time",
}
"""What was measured, in words; docs/results.md has the table."""


class Chosen(NamedTuple):
    """What was chosen."""

    quality: Quality
    method: "Method"
    options: Mapping[str, Any]
    """Of `jprune.pipeline.recipe.Recipe`, where they are not the usual ones."""
    why: str
    """What it measured, in words."""

    @property
    def command(self) -> str:
        """The words of the command line that are the same."""
        fields = {field.name: field.default for field in dataclasses.fields(self.method)}
        own = {name: value for name in fields if (value := getattr(self.method, name)) != fields[name]}
        words = [f"--{name.replace('_', '-')} {value}" for name, value in (own | dict(self.options)).items()]
        return " ".join(["jprune prune", name_of(self.method), *words])

    def json(self) -> dict[str, str]:
        """As records and `--json` have it."""
        return {"quality": self.quality, "command": self.command, "why": self.why}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto:
    """Prune by the method and options that measured best, for those who do not want to choose."""

    quality: Quality = "balanced"
    """What it may cost: fast (about 1.2 times what sparsegpt takes), balanced (about 2.7 times, no gradients) or best
    (about five times). What is chosen is printed, and stands in the record."""

    def __post_init__(self):
        if self.quality not in get_args(Quality):
            raise JpruneError(f"quality is one of {', '.join(get_args(Quality))}; got {self.quality!r}")

    def chosen(self, recipe: "Recipe") -> Chosen:
        """What to prune by."""
        from jprune.methods import Admm, Alps, SparseGPT

        if self.quality == "fast":
            return Chosen(self.quality, SparseGPT(damping=DAMPING, refit=4), {}, WHY[self.quality])
        # An N:M pattern is for hardware that wants the same of every kernel.
        shared = isinstance(recipe.pattern, Unstructured) and not recipe.keep_zeros
        options = {"allocate": "loss"} if shared else {}
        method: Method = Admm(damping=DAMPING, iterations=10, dense_targets=0.5)
        if self.quality == "best":
            grouped = isinstance(recipe.pattern, NM)
            method = Alps(damping=DAMPING_BY_GROUPS if grouped else DAMPING, dense_targets=0.5)
        return Chosen(self.quality, method, options, WHY[self.quality])


def decided(method: "Method | Auto", recipe: "Recipe") -> tuple["Method", "Recipe", Chosen | None]:
    """The method and the recipe of a run. Options of the recipe that the user has changed stay as they are."""
    if not isinstance(method, Auto):
        return method, recipe, None
    chosen = method.chosen(recipe)
    usual = {field.name: field.default for field in dataclasses.fields(recipe)}
    free = {name: value for name, value in chosen.options.items() if getattr(recipe, name) == usual[name]}
    return chosen.method, dataclasses.replace(recipe, **free), chosen._replace(options=free)
