"""Solvers: new weights that make up for what was pruned."""

from jprune.solvers.admm import admm as admm
from jprune.solvers.alps import alps as alps
from jprune.solvers.compensate import compensate as compensate
from jprune.solvers.pruned import Pruned as Pruned
from jprune.solvers.refit import refit as refit
from jprune.solvers.sparsegpt import sparsegpt as sparsegpt
from jprune.solvers.targets import dense_targets as dense_targets
