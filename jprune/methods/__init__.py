"""Methods: a score, a solver, or both, as frozen configs.

One definition serves Python, the command line and recipe files. A method is one file: its source, its equation, its
function of arrays, its options, the statistic it needs and what it costs. A new one is a dataclass with a call that
prunes one kernel; everything above it (`prune`, the block pipeline) then works with it:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ActivationOnly(Method):
        statistic = SquaredNorm

        def __call__(self, kernel, statistic, pattern, keep=None):
            scores = jnp.broadcast_to(statistic.total[:, None], kernel.shape)
            return masked(kernel, masks.select(scores, pattern, keep=keep))

A method that only scores is shorter still, see `ByScore`. A line in `jprune.pipeline.registry` gives a method of jprune
its name on the command line.
"""

from jprune.methods.admm import Admm as Admm
from jprune.methods.alps import Alps as Alps
from jprune.methods.base import ByScore as ByScore
from jprune.methods.base import Method as Method
from jprune.methods.base import masked as masked
from jprune.methods.function import prune_function as prune_function
from jprune.methods.magnitude import Magnitude as Magnitude
from jprune.methods.prune import prune as prune
from jprune.methods.prune import refit as refit
from jprune.methods.sparsegpt import SparseGPT as SparseGPT
from jprune.methods.wanda import Wanda as Wanda
