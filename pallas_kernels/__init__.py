"""Sparse matmul kernels for JAX: load as sparse, compute as dense.

The packed formats, their packing and the Pallas kernels that read them will live here. The package imports jax and
numpy only, never jprune, so that it can be used on its own.
"""
