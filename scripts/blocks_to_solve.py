"""Kernels of one block, and inputs for them, of the sizes of known models: what the solvers' benches have in common."""

import numpy as np

SHAPES: dict[str, list[tuple[int, dict[str, int]]]] = {
    "tiny": [(48, {"q": 48, "k": 16}), (128, {"down": 48})],
    "smollm2-135m": [
        (576, {"q": 576, "k": 192, "v": 192}),
        (576, {"o": 576}),
        (576, {"gate": 1536, "up": 1536}),
        (1536, {"down": 576}),
    ],
    "llama-7b": [
        (4096, {"q": 4096, "k": 4096, "v": 4096}),
        (4096, {"o": 4096}),
        (4096, {"gate": 11008, "up": 11008}),
        (11008, {"down": 4096}),
    ],
}
"""Kernels by the input that they share: (d_in, {kernel: d_out})."""


def random_gram(rng: np.random.Generator, d_in: int) -> np.ndarray:
    """A Gram matrix of correlated inputs: lognormal scales plus a part of rank 256."""
    low_rank = rng.standard_normal((d_in, 256), dtype=np.float32) * rng.lognormal(0, 1, (d_in, 1)).astype(np.float32)
    return low_rank @ low_rank.T + np.diag(rng.lognormal(3, 1, d_in).astype(np.float32))


def random_kernels(rng: np.random.Generator, d_in: int, outputs: dict[str, int]) -> dict[str, np.ndarray]:
    """Kernels [d_in, d_out] by name."""
    return {name: rng.standard_normal((d_in, n), dtype=np.float32) * 0.02 for name, n in outputs.items()}
