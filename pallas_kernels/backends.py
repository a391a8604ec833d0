"""Which kernels run on an NVIDIA GPU: Pallas' own or those in Triton's language, by one name each.

Both have the functions `multiply` and `dense_rows`, of the same arguments and results. A backend's packages are
imported when it is first asked for.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Literal, get_args

from pallas_kernels.errors import FormatError

Backend = Literal["pallas", "triton"]
"""Pallas' Triton lowering, which comes with JAX, or kernels in Triton's language, which `jax_triton` calls."""
NAMES = get_args(Backend)


def load(name: str, *, interpret: bool = False) -> ModuleType:
    """The module of a backend; raises a FormatError if it is not known or cannot run here.

    Args:
      name: "pallas" or "triton".
      interpret: only what its interpreter needs is asked for.
    """
    if name not in NAMES:
        raise FormatError(f"backend is {' or '.join(NAMES)}; got {name!r}")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise FormatError(
            "backend='triton' needs triton and jax-triton, which are not installed: pip install 'jprune[gpu]' has "
            "versions that go together, or use backend='pallas'"
        )
    module = importlib.import_module(f"pallas_kernels._{name}")
    if name == "triton" and not interpret:
        module.require()
    return module
