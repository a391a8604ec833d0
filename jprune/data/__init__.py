"""Token windows for calibration and evaluation."""

from jprune.data.windows import Windows as Windows
from jprune.data.windows import calibration as calibration
from jprune.data.windows import evaluation as evaluation
