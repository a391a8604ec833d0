"""A pruned checkpoint, without pruning."""

import numpy as np
from safetensors.numpy import load_file, save_file


def sparse(folder, share=0.5):
    """The model with zeros in its kernels, as a pruned checkpoint has them."""
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(2)
    for key, x in tensors.items():
        if "proj" in key:
            tensors[key] = np.where(rng.random(x.shape) < share, np.zeros_like(x), x)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
