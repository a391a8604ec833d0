"""Packed kernels in the decoder: stored as `pallas_kernels` packs them, multiplied by as they are."""

from jprune.sparse.kernel import PackedKernel as PackedKernel
from jprune.sparse.kernel import on_backend as on_backend
from jprune.sparse.kernel import rooms as rooms
from jprune.sparse.kernel import runs_as as runs_as
from jprune.sparse.packing import Packing as Packing
from jprune.sparse.packing import from_arrays as from_arrays
from jprune.sparse.packing import rounding as rounding
