"""The authors' pruned models, to the parameter, from shapes alone: trace, units, selection and surgery.

LLaMA-7B with 25 % of the heads and channels of layers 4 to 29 is published with 5 422 977 024 parameters (LLM-Pruner's
issue 34), Llama-3-8B with the same with 6 612 586 496 (its README).
"""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.models import decoder
from jprune.models.config import DecoderConfig
from jprune.structured import LLMPruner, block_units, shrink
from jprune.structured.selection import Target
from jprune.structured.surgery import size
from jprune.structured.units import positions
from jprune.trace import coupled_axes, matmuls

ROOT = pathlib.Path(__file__).parents[2]

LLAMA_7B = dict(vocab=32000, layers=32, heads=32, kv_heads=32, d_ff=11008)
LLAMA_3_8B = dict(vocab=128256, layers=32, heads=32, kv_heads=8, d_ff=14336)


def traced(sizes, kinds=("attention", "mlp")):
    """The abstract parameters of a model, and the units of all of its blocks; these are equal, so one is traced."""
    config = DecoderConfig(architecture="LlamaForCausalLM", d_model=4096, head_dim=128, context=4096, **sizes)
    params = decoder.abstract_params(config, jnp.bfloat16)
    block, x = decoder.block(config, 0), jax.ShapeDtypeStruct((1, 8, 4096), jnp.bfloat16)
    args = block, params["blocks"]["0"], x
    units = block_units(coupled_axes(*args), params["blocks"]["0"], matmuls(*args), kinds=kinds)
    return params, [u.at(f"blocks/{i}") for i in range(config.layers) for u in units]


@pytest.mark.parametrize(
    ("sizes", "before", "after"),
    [(LLAMA_7B, 6_738_415_616, 5_422_977_024), (LLAMA_3_8B, 8_030_261_248, 6_612_586_496)],
    ids=["LLaMA-7B", "Llama-3-8B"],
)
def test_published_sizes(sizes, before, after):
    params, units = traced(sizes)
    method = LLMPruner()
    chosen = method.prunable(units, 32)
    assert sorted({u.layer for u in chosen}) == list(range(4, 30))
    scores = {u.name: np.arange(float(u.count)) for u in chosen}
    keep = positions(chosen, method.select(chosen, scores, 0.25))
    small = shrink(params, keep)
    assert size(params) == before
    assert size(small) == size(params, keep) == after
    heads, kv_heads = sizes["heads"] * 3 // 4, sizes["kv_heads"] * 3 // 4
    block = trees.flatten(small["blocks"]["4"])
    assert block["attn/q/kernel"].shape == (4096, heads, 128)
    assert block["attn/k/kernel"].shape == (4096, kv_heads, 128)
    assert block["attn/o/kernel"].shape == (heads, 128, 4096)
    assert block["mlp/down/kernel"].shape == (sizes["d_ff"] * 3 // 4, 4096)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, small["blocks"]["30"], params["blocks"]["30"]))


def test_a_count_as_target():
    """The published size, asked for as a number of parameters, is the published ratio."""
    params, units = traced(LLAMA_7B)
    method = LLMPruner(importance="random")
    chosen = method.prunable(units, 32)
    scores = {u.name: method.score(u) for u in chosen}
    kept = Target(parameters=5_422_977_024).reach(
        lambda ratio: method.select(chosen, scores, ratio),
        lambda kept: size(params, positions(chosen, kept)),
        size(params),
    )
    assert size(params, positions(chosen, kept)) == 5_422_977_024
    assert {u.kind: len(kept[u.name]) for u in chosen} == {"attention": 24, "mlp": 8256}


PROGRAM = """
import sys
sys.path.insert(0, "tests/faults")
import test_published_sizes as here
from jprune.runs.stopwatch import peak_memory_bytes
here.test_published_sizes(here.LLAMA_7B, 6_738_415_616, 5_422_977_024)
print(peak_memory_bytes())
"""


def test_memory():
    """Trace, selection and surgery of LLaMA-7B in less than 1 GiB, JAX itself counted."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**30
