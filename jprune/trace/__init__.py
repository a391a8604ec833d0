"""One walk of the jaxpr: every matmul against a parameter, what feeds it and what depends on it."""

from jprune.trace.coupling.axes import coupled_axes as coupled_axes
from jprune.trace.coupling.group import Group as Group
from jprune.trace.coupling.group import Groups as Groups
from jprune.trace.coupling.group import Member as Member
from jprune.trace.matmuls import ParamMatmul as ParamMatmul
from jprune.trace.matmuls import Skipped as Skipped
from jprune.trace.matmuls import matmuls as matmuls
from jprune.trace.matmuls import skipped as skipped
from jprune.trace.observe import observe as observe
from jprune.trace.report import Leaf as Leaf
from jprune.trace.report import Report as Report
from jprune.trace.report import report as report
from jprune.trace.stages import Stages as Stages
from jprune.trace.stages import stages as stages
