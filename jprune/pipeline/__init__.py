"""The block pipeline: whole models, one block at a time. What is named here is imported when it is used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jprune.pipeline.oneshot.run import plan_run as plan_run
    from jprune.pipeline.oneshot.run import prune_model as prune_model
    from jprune.pipeline.recipe import Recipe as Recipe
    from jprune.pipeline.rounds.run import prune_and_tune as prune_and_tune

_LAZY = {
    "Recipe": "jprune.pipeline.recipe",
    "plan_run": "jprune.pipeline.oneshot.run",
    "prune_model": "jprune.pipeline.oneshot.run",
    "prune_and_tune": "jprune.pipeline.rounds.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jprune.pipeline' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
