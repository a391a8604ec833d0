"""Sparse matmul kernels for JAX: load as sparse, compute as dense.

    packed = pallas_kernels.pack(kernel, "capped:4")       # [d_in, d_out], half of it zeros
    y = pallas_kernels.matmul(x, packed)                   # x [..., d_in] -> [..., d_out]

Formats, packing, Pallas kernels for NVIDIA GPUs and plain JAX references for everything else. The package imports jax
and numpy only, never jprune, so that it can be used on its own.
"""

from pallas_kernels.choose import Choice as Choice
from pallas_kernels.choose import choose as choose
from pallas_kernels.errors import FormatError as FormatError
from pallas_kernels.formats import Bitmap as Bitmap
from pallas_kernels.formats import Capped as Capped
from pallas_kernels.formats import Packed as Packed
from pallas_kernels.formats import TiledCSL as TiledCSL
from pallas_kernels.matmul import matmul as matmul
from pallas_kernels.packing import pack as pack
from pallas_kernels.packing import unpack as unpack
from pallas_kernels.packing import values as values
from pallas_kernels.packing import with_values as with_values
from pallas_kernels.shards import matmul_shards as matmul_shards
from pallas_kernels.shards import pack_shards as pack_shards
from pallas_kernels.storage import from_arrays as from_arrays
from pallas_kernels.storage import to_arrays as to_arrays
from pallas_kernels.sweep import sparsegpt_sweep as sparsegpt_sweep
