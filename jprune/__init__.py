"""Prune language models in JAX.

Every public name is imported when it is first used, so `import jprune` costs next to nothing; the arrays-and-pytrees
part needs jax, optax and numpy alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `_NAMES` and `_MODULES` say, for type checkers and editors
    from jprune import masks as masks
    from jprune import patterns as patterns
    from jprune import scores as scores
    from jprune import solvers as solvers
    from jprune import statistics as statistics
    from jprune import trees as trees
    from jprune.checkpoints import formats as formats
    from jprune.checkpoints import load as load
    from jprune.cross_gram import CrossGram as CrossGram
    from jprune.data import instructions as instructions
    from jprune.errors import JpruneError as JpruneError
    from jprune.methods import Admm as Admm
    from jprune.methods import Alps as Alps
    from jprune.methods import ByScore as ByScore
    from jprune.methods import Magnitude as Magnitude
    from jprune.methods import Method as Method
    from jprune.methods import SparseGPT as SparseGPT
    from jprune.methods import Wanda as Wanda
    from jprune.methods import masked as masked
    from jprune.methods.function import prune_function as prune_function
    from jprune.methods.prune import prune as prune
    from jprune.methods.prune import refit as refit
    from jprune.models import decoder as decoder
    from jprune.patterns import NM as NM
    from jprune.patterns import Unstructured as Unstructured
    from jprune.pipeline.auto import Auto as Auto
    from jprune.pipeline.compare import compare as compare
    from jprune.pipeline.oneshot.run import plan_run as plan_run
    from jprune.pipeline.oneshot.run import prune_model as prune_model
    from jprune.pipeline.options import DynamicLoading as DynamicLoading
    from jprune.pipeline.pack import pack as pack
    from jprune.pipeline.recipe import Recipe as Recipe
    from jprune.pipeline.rounds.plan import plan_prune_and_tune as plan_prune_and_tune
    from jprune.pipeline.rounds.run import prune_and_tune as prune_and_tune
    from jprune.pipeline.shrink.plan import plan_shrink as plan_shrink
    from jprune.pipeline.shrink.run import shrink_model as shrink_model
    from jprune.pipeline.training.calls import loraprune_model as loraprune_model
    from jprune.pipeline.training.calls import plan_loraprune as plan_loraprune
    from jprune.pipeline.training.calls import plan_shearing as plan_shearing
    from jprune.pipeline.training.calls import shear_model as shear_model
    from jprune.pipeline.training.calls import tune_model as tune_model
    from jprune.places import Observed as Observed
    from jprune.places import Place as Place
    from jprune.solvers import Pruned as Pruned
    from jprune.statistics import Gram as Gram
    from jprune.statistics import Moments as Moments
    from jprune.statistics import SquaredNorm as SquaredNorm
    from jprune.structured import DropLayers as DropLayers
    from jprune.structured import LLMPruner as LLMPruner
    from jprune.structured import RemoveExperts as RemoveExperts
    from jprune.structured import shrink as shrink
    from jprune.structured import shrink_function as shrink_function
    from jprune.structured.selection import Target as Target
    from jprune.trace import coupled_axes as coupled_axes
    from jprune.trace.matmuls import matmuls as matmuls
    from jprune.trace.matmuls import skipped as skipped
    from jprune.trace.observe import observe as observe
    from jprune.trace.report import report as report
    from jprune.trace.stages import stages as stages
    from jprune.train import lora as lora
    from jprune.train import schedules as schedules
    from jprune.train.gradual import gradual as gradual
    from jprune.train.keep_masked import keep_masked as keep_masked
    from jprune.train.loraprune import loraprune as loraprune
    from jprune.train.shearing import scaling_law as scaling_law
    from jprune.train.shearing.dynamic_loading import Reweighing as Reweighing
    from jprune.trees import apply_masks as apply_masks
    from jprune.trees import sparsity as sparsity
    from jprune.tuning.full import Full as Full
    from jprune.tuning.lora import Lora as Lora
    from jprune.tuning.loraprune import LoRAPrune as LoRAPrune
    from jprune.tuning.shearing import Shearing as Shearing

_NAMES = {
    "jprune.checkpoints": ("load",),
    "jprune.cross_gram": ("CrossGram",),
    "jprune.errors": ("JpruneError",),
    "jprune.methods": ("Admm", "Alps", "ByScore", "Magnitude", "Method", "SparseGPT", "Wanda", "masked"),
    "jprune.methods.function": ("prune_function",),
    "jprune.methods.prune": ("prune", "refit"),
    "jprune.patterns": ("NM", "Unstructured"),
    "jprune.places": ("Observed", "Place"),
    "jprune.pipeline.auto": ("Auto",),
    "jprune.pipeline.compare": ("compare",),
    "jprune.pipeline.recipe": ("Recipe",),
    "jprune.pipeline.oneshot.run": ("plan_run", "prune_model"),
    "jprune.pipeline.options": ("DynamicLoading",),
    "jprune.pipeline.pack": ("pack",),
    "jprune.pipeline.rounds.plan": ("plan_prune_and_tune",),
    "jprune.pipeline.rounds.run": ("prune_and_tune",),
    "jprune.pipeline.shrink.plan": ("plan_shrink",),
    "jprune.pipeline.shrink.run": ("shrink_model",),
    "jprune.pipeline.training.calls": (
        "loraprune_model",
        "plan_loraprune",
        "plan_shearing",
        "shear_model",
        "tune_model",
    ),
    "jprune.solvers": ("Pruned",),
    "jprune.statistics": ("Gram", "Moments", "SquaredNorm"),
    "jprune.structured": ("DropLayers", "LLMPruner", "RemoveExperts", "shrink", "shrink_function"),
    "jprune.structured.selection": ("Target",),
    "jprune.trace": ("coupled_axes",),
    "jprune.trace.matmuls": ("matmuls", "skipped"),
    "jprune.trace.observe": ("observe",),
    "jprune.trace.report": ("report",),
    "jprune.trace.stages": ("stages",),
    "jprune.train.gradual": ("gradual",),
    "jprune.train.keep_masked": ("keep_masked",),
    "jprune.train.loraprune": ("loraprune",),
    "jprune.train.shearing.dynamic_loading": ("Reweighing",),
    "jprune.trees": ("apply_masks", "sparsity"),
    "jprune.tuning.full": ("Full",),
    "jprune.tuning.lora": ("Lora",),
    "jprune.tuning.loraprune": ("LoRAPrune",),
    "jprune.tuning.shearing": ("Shearing",),
}
"""Functions and classes, by the module that has them."""
_MODULES = {
    "decoder": "jprune.models.decoder",
    "formats": "jprune.checkpoints.formats",
    "instructions": "jprune.data.instructions",
    "lora": "jprune.train.lora",
    "masks": "jprune.masks",
    "patterns": "jprune.patterns",
    "scaling_law": "jprune.train.shearing.scaling_law",
    "schedules": "jprune.train.schedules",
    "scores": "jprune.scores",
    "solvers": "jprune.solvers",
    "statistics": "jprune.statistics",
    "trees": "jprune.trees",
}
_LAZY = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__all__":  # for `from jprune import *`
        return sorted({*_LAZY, *_MODULES})
    where = _LAZY.get(name) or _MODULES.get(name)
    if where is None:
        raise AttributeError(f"module 'jprune' has no attribute {name!r}")
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        from jprune.packages import missing

        raise missing(error, f"jprune.{name}") from error
    value = getattr(module, name) if name in _LAZY else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
