"""Training runs over a checkpoint, whatever is trained."""

from jprune.pipeline.training.calls import TrainingPlan as TrainingPlan
from jprune.pipeline.training.calls import loraprune_model as loraprune_model
from jprune.pipeline.training.calls import plan_loraprune as plan_loraprune
from jprune.pipeline.training.calls import plan_shearing as plan_shearing
from jprune.pipeline.training.calls import plan_training as plan_training
from jprune.pipeline.training.calls import shear_model as shear_model
from jprune.pipeline.training.calls import tune_model as tune_model
from jprune.pipeline.training.run import train_model as train_model
