"""Random sparse kernels that fit a packed format, with what is awkward in them."""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np


def load_script(name: str):
    """A program of scripts/ as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / f"scripts/{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def random_mask(rng, d_in: int, d_out: int, format: str, *, density: float = 0.4) -> np.ndarray:
    """True = keep: as full as "capped:C" can be in the first output, random elsewhere, with an empty first tile row."""
    mask = rng.random((d_in, d_out)) < density
    if format.startswith("capped"):
        capacity = int(format[-1])
        order = rng.random((d_in, d_out))
        for start in range(0, d_in, 8):
            group = order[start : start + 8]
            best = np.argsort(np.argsort(-group, axis=0), axis=0) < capacity
            mask[start : start + 8] &= best
            mask[start : start + 8, 0] = best[:, 0]
    return mask


def random_kernel(rng, mask: np.ndarray, dtype: str) -> np.ndarray:
    """Normal weights where the mask keeps them, of both signs and without accidental zeros."""
    weights = rng.standard_normal(mask.shape).astype(np.float32)
    weights += np.where(weights < 0, -0.05, 0.05).astype(np.float32)
    return np.where(mask, weights, 0).astype(np.dtype(getattr(jnp, dtype)))
