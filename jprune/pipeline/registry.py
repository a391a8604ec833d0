"""The only list of methods: the name each has on the command line and in records, and where it is.

To add a method, write its file and one line here; command line, reports, docs and contract tests read this list. A
line is ``name: "module:class"``, in words, so that reading the list imports no method: help needs names and first
lines.
`Methods` imports a class when it is asked for, from the module that defines it. A group is told by what can be done
with its methods; `jprune prune` has all groups but the last, which `jprune tune` has.
"""

import ast
import functools
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


class Methods(Mapping[str, Any]):
    """Methods by name: classes, imported when they are asked for (or a function, where a method has no class)."""

    def __init__(self, places: Mapping[str, str]):
        self._places = dict(places)

    def __getitem__(self, name: str) -> Any:
        module, _, member = self._places[name].partition(":")
        return getattr(importlib.import_module(module), member)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:  # Mapping's own would import the class
        return name in self._places

    def __or__(self, other: "Methods") -> "Methods":
        return Methods(self._places | other._places)

    def place(self, name: str) -> str:
        """The ``module:class`` of a method."""
        return self._places[name]

    def summary(self, name: str) -> str:
        """The first line of a method's docstring, read from its source: nothing is imported."""
        return _summary(self._places[name])


@functools.cache
def _summary(place: str) -> str:
    module, _, member = place.partition(":")
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == member:
            return (ast.get_docstring(node) or "").split("\n")[0]
    raise AttributeError(f"{path} defines no {member}, which the registry says it does")


ONE_SHOT = Methods(
    {
        "magnitude": "jprune.methods.magnitude:Magnitude",
        "wanda": "jprune.methods.wanda:Wanda",
        "sparsegpt": "jprune.methods.sparsegpt:SparseGPT",
        "admm": "jprune.methods.admm:Admm",
        "alps": "jprune.methods.alps:Alps",
    }
)
"""Set weights to zero, one kernel at a time: each is a `jprune.methods.Method`."""

AUTOMATIC = Methods({"auto": "jprune.pipeline.auto:Auto"})
"""Choose one of `ONE_SHOT`, and its options."""

IN_ROUNDS = Methods({"prune-and-tune": "jprune.pipeline.rounds.run:prune_and_tune"})
"""Prune by a method of `ONE_SHOT` and train by one of `TUNERS`, in turn."""

STRUCTURED = Methods(
    {
        "llm-pruner": "jprune.structured.llm_pruner:LLMPruner",
        "layers": "jprune.structured.drop_layers:DropLayers",
        "experts": "jprune.structured.experts:RemoveExperts",
    }
)
"""Remove parts of a model without training it."""

TRAINED = Methods(
    {
        "loraprune": "jprune.tuning.loraprune:LoRAPrune",
        "shearing": "jprune.tuning.shearing:Shearing",
    }
)
"""Remove parts of a model while it is trained."""

PRUNERS = AUTOMATIC | ONE_SHOT | IN_ROUNDS | STRUCTURED | TRAINED
"""All of `jprune prune`."""

TUNERS = Methods(
    {
        "lora": "jprune.tuning.lora:Lora",
        "full": "jprune.tuning.full:Full",
    }
)
"""All of `jprune tune`: train what pruning left, as it is."""

ALLOCATIONS = Methods(
    {
        "uniform": "jprune.allocations.base:Uniform",
        "linear": "jprune.allocations.linear:Linear",
        "owl": "jprune.allocations.owl:OWL",
        "dlp": "jprune.allocations.dlp:DLP",
        "loss": "jprune.allocations.loss:Loss",
    }
)
"""All of ``--allocate``: how methods of `ONE_SHOT` share the zeros of a model out over its blocks."""


def name_of(method: object) -> str:
    """The name of a method or an allocation on the command line and in records; the class's name if it is not listed.

    A class made from a listed one is another method: a run that was begun with one is not resumed with the other.
    """
    kind = type(method)
    places = {place: name for name, place in (PRUNERS | TUNERS | ALLOCATIONS)._places.items()}
    return places.get(f"{kind.__module__}:{kind.__qualname__}", kind.__name__)
