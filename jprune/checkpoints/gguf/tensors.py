"""The values of a GGUF file's tensors, dequantised."""

import ml_dtypes
import numpy as np

from jprune.checkpoints.gguf.header import Header, Tensor

PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types that hold numbers as they are."""


def read_tensor(header: Header, tensor: Tensor) -> np.ndarray:
    """A tensor as it lies in the file, dequantised if it is quantised."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = header.data[tensor.begin : tensor.begin + tensor.nbytes]
    kind = GGMLQuantizationType(tensor.type)
    if kind.name in PLAIN:
        return np.frombuffer(raw, PLAIN[kind.name]).reshape(tensor.shape).copy()
    return dequantize(np.frombuffer(raw, np.uint8).reshape(*tensor.shape[:-1], -1), kind)
