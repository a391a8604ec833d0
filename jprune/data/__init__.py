"""Token windows for calibration and evaluation, and batches to train on."""

from jprune.data.batches import Batches as Batches
from jprune.data.batches import token_batches as token_batches
from jprune.data.held_out import overlap as overlap
from jprune.data.mixture import Mixture as Mixture
from jprune.data.training import evaluation_batches as evaluation_batches
from jprune.data.training import training_batches as training_batches
from jprune.data.windows import Windows as Windows
from jprune.data.windows import calibration as calibration
from jprune.data.windows import evaluation as evaluation
