"""The block pipeline: whole models, one block at a time."""

from jprune.pipeline.prune_and_tune import prune_and_tune as prune_and_tune
from jprune.pipeline.recipe import Recipe as Recipe
from jprune.pipeline.run import plan_run as plan_run
from jprune.pipeline.run import prune_model as prune_model
