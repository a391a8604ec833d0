"""Models that have been pruned before, pruned further."""

import functools
import json

import numpy as np
import pytest

import jprune
from jprune import Magnitude, SparseGPT, Unstructured, Wanda

prune_model = functools.partial(jprune.prune_model, micro_batch=2)


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT(block_size=16)], ids=lambda m: type(m).__name__)
def test_a_pruned_model_is_pruned_further(tiny_model, token_file, tmp_path, method):
    """30 % by magnitude in each output, then 60 %: counts are those of 60 %, and nothing that was zero comes back."""

    def prune(tensors):
        for key in [k for k in tensors if "proj" in k]:  # [d_out, d_in], as PyTorch has it
            smallest = np.argsort(np.abs(tensors[key]), axis=1)[:, : int(0.3 * tensors[key].shape[1])]
            np.put_along_axis(tensors[key], smallest, 0, axis=1)

    folder = tiny_model(change=prune)
    recipe = dict(pattern=Unstructured(0.6), calibration=token_file())
    report = prune_model(folder, tmp_path / "kept", method=method, keep_zeros=True, **recipe)
    prune_model(folder, tmp_path / "anew", method=method, **recipe)
    before, kept, anew = (jprune.load(f) for f in (folder, tmp_path / "kept", tmp_path / "anew"))
    revived = 0
    for kernel in report.kernels:
        old, new = before.read(kernel.path), kept.read(kernel.path)
        assert (new[old == 0] == 0).all(), kernel.path
        d_in = 56 if "down" in kernel.path else 32
        pattern = Unstructured(0.6, "output" if isinstance(method, Wanda) else "kernel")
        assert (new == 0).sum() == pattern.zeros(d_in, new.size // d_in), kernel.path
        revived += int((anew.read(kernel.path)[old == 0] != 0).sum())
    # Weights that are updated on the way may grow above others before their turn comes; scores of zero never do.
    assert bool(revived) == isinstance(method, SparseGPT)
    assert json.loads((tmp_path / "kept" / "jprune.json").read_text())["recipe"]["keep_zeros"] is True
