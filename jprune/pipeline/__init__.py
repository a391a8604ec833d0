"""The block pipeline: whole models, one block at a time."""

from jprune.pipeline.oneshot.recipe import Recipe as Recipe
from jprune.pipeline.oneshot.run import plan_run as plan_run
from jprune.pipeline.oneshot.run import prune_model as prune_model
from jprune.pipeline.rounds.run import prune_and_tune as prune_and_tune
