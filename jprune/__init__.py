"""Prune language models in JAX.

The arrays-and-pytrees part is imported at once and needs JAX only; what reads checkpoints is imported when it is used.
"""

from typing import TYPE_CHECKING, Any

from jprune import masks as masks
from jprune import patterns as patterns
from jprune import scores as scores
from jprune import solvers as solvers
from jprune import statistics as statistics
from jprune import trees as trees
from jprune.errors import JpruneError as JpruneError
from jprune.methods import Magnitude as Magnitude
from jprune.methods import Method as Method
from jprune.methods import SparseGPT as SparseGPT
from jprune.methods import Wanda as Wanda
from jprune.methods import prune as prune
from jprune.patterns import NM as NM
from jprune.patterns import Unstructured as Unstructured
from jprune.solvers import Pruned as Pruned
from jprune.statistics import Gram as Gram
from jprune.statistics import Moments as Moments
from jprune.statistics import SquaredNorm as SquaredNorm
from jprune.structured import DropLayers as DropLayers
from jprune.structured import LLMPruner as LLMPruner
from jprune.structured import shrink as shrink
from jprune.trace import coupled_axes as coupled_axes
from jprune.trace import matmuls as matmuls
from jprune.trace import observe as observe
from jprune.trace import stages as stages
from jprune.trees import apply_masks as apply_masks
from jprune.trees import sparsity as sparsity

if TYPE_CHECKING:
    from jprune.checkpoints import load as load
    from jprune.pipeline import Recipe as Recipe
    from jprune.pipeline import plan_run as plan_run
    from jprune.pipeline import prune_model as prune_model
    from jprune.train.gradual import gradual as gradual
    from jprune.train.keep_masked import keep_masked as keep_masked

_LAZY = {
    "load": "jprune.checkpoints",
    "Recipe": "jprune.pipeline",
    "plan_run": "jprune.pipeline",
    "prune_model": "jprune.pipeline",
    "gradual": "jprune.train.gradual",
    "keep_masked": "jprune.train.keep_masked",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jprune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
