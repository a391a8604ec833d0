"""Runs a kernel in Triton's own language in Triton's interpreter, on the host: for tests.

Triton interprets where TRITON_INTERPRET=1 was set before `triton` was imported; its own functions are made for the one
or the other then. It takes PyTorch's tensors, and what it asks of them NumPy arrays can tell as well. Every address
that a kernel reads or writes is checked to lie within the arrays.
"""

import contextlib
import functools
import threading
from unittest import mock

import jax
import numpy as np
import triton

from pallas_kernels.errors import FormatError

_one_at_a_time = threading.Lock()
"""The interpreter has one place for the number of the program that it runs."""


class _Memory:
    """A NumPy array as the interpreter wants to see a tensor on the host."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *shape, device):
        return _Memory(self.array)

    def set_(self, storage, offset, size, stride):
        """The memory is there."""

    def copy_(self, other):
        """What is written is written."""

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)


def call(launch) -> jax.Array:
    """The result of a `_triton.Launch`, from within a JAX program."""
    if not triton.knobs.runtime.interpret:
        raise FormatError(
            "backend='triton' with interpret=True needs TRITON_INTERPRET=1 in the environment before Python starts"
        )
    return jax.pure_callback(functools.partial(run, launch), launch.out, *launch.arrays)


def run(launch, *arrays) -> np.ndarray:
    """The same of concrete arrays."""
    inputs = [np.ascontiguousarray(np.asarray(x)) for x in arrays]
    out = np.zeros(launch.out.shape, launch.out.dtype)
    with _one_at_a_time, _checked([*inputs, out]):
        launch.kernel[launch.grid](*map(_Memory, inputs), _Memory(out), **launch.constants)
    return out


@contextlib.contextmanager
def _checked(arrays):
    """Raises an IndexError at the first address outside of the arrays."""
    from triton.runtime.interpreter import interpreter_builder as builder

    ranges = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]

    def load(pointers, mask, *rest, load=builder.create_masked_load):
        check(pointers, mask, ranges)
        return load(pointers, mask, *rest)

    def store(pointers, value, mask, *rest, store=builder.create_masked_store):
        check(pointers, mask, ranges[-1:])
        return store(pointers, value, mask, *rest)

    with (
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
    ):
        yield


def check(pointers, mask, ranges) -> None:
    """Raises an IndexError for addresses (where the mask is set) that lie in none of the ranges of bytes."""
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
    size = pointers.get_element_ty().primitive_bitwidth // 8
    known = np.zeros(addresses.shape, bool)
    for begin, end in ranges:
        known |= (addresses >= begin) & (addresses + size <= end)
    if not known.all():
        raise IndexError(f"a kernel reads or writes outside of its arrays, at {addresses[~known][:4]} of {ranges}")
