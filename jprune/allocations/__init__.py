"""Allocations: how the zeros of a model are shared out over its blocks. Their number stays what it is.

An allocation is one file: its source, its equation, its function of arrays and its config, an `Allocation`. It gives
every block an importance; `spread` makes sparsities of those, and whole numbers of zeros of these. A line in
`jprune.pipeline.registry` gives it its name on the command line.
"""

from jprune.allocations.base import Allocation as Allocation
from jprune.allocations.base import Uniform as Uniform
from jprune.allocations.dlp import DLP as DLP
from jprune.allocations.linear import Linear as Linear
from jprune.allocations.loss import Loss as Loss
from jprune.allocations.owl import OWL as OWL
