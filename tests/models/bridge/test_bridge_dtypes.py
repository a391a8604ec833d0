"""Checkpoints in bfloat16 of which transformers keeps some parameters in float32, on both roads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
import bridged
import hf_families as hf
import torch
import transformers

from jprune import devices
from jprune.checkpoints import load
from jprune.evaluate.passing import through_blocks
from jprune.methods import Magnitude
from jprune.patterns import Unstructured
from jprune.pipeline import prune_model

TOKENS = hf.tokens(12)
SMALL = bridged.SMALL | {"head_dim": 8, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
OPTIONS = {
    "Dots1ForCausalLM": SMALL | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "SolarOpenForCausalLM": SMALL | {"n_routed_experts": 8, "n_shared_experts": 1},
    "Ernie4_5_MoeForCausalLM": SMALL | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
}
CASES = [
    ("Dots1ForCausalLM", "gate.weight"),
    ("SolarOpenForCausalLM", "correction_bias"),
    ("Ernie4_5_MoeForCausalLM", "correction_bias"),
    ("DeepseekV2-0", "gate.weight"),
    ("DeepseekV3-2", "correction_bias"),
    ("Glm4Moe-0", "correction_bias"),
]


def saved(folder, name, which):
    """A model in bfloat16, but that `which` has experts whose numbers are one in bfloat16, and not in float32."""
    made = hf.make(name) if name in hf.VARIANTS else hf.model(name, OPTIONS[name])
    hf.save(made, folder / "float32")
    made = theirs(folder / "float32", torch.bfloat16)
    torch.manual_seed(1)
    found = [value for key, value in made.state_dict().items() if key.endswith(which)]
    assert found
    for value in found:
        assert value.dtype == torch.float32
        base, spread = (24.0, 0.02) if which == "correction_bias" else (0.375, 3e-4)
        value.copy_(base + spread * torch.randn_like(value).clamp(-3, 3))
        assert len(value.bfloat16().unique()) == 1
    return hf.save(made, folder / "source")


def theirs(folder, dtype):
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager).eval()


@pytest.mark.parametrize(("name", "which"), CASES)
def test_what_transformers_keeps_in_float32_stays_float32(name, which, tmp_path):
    """Logits in bfloat16 differ from transformers' by what bfloat16 rounds: every token has the same experts."""
    source = saved(tmp_path, name, which)
    checkpoint = load(source)
    assert checkpoint.road == ("native" if name in hf.VARIANTS else "PyTorch's module")
    passed = through_blocks(checkpoint, TOKENS, dtype=jnp.bfloat16, mesh=devices.make_mesh(devices=jax.devices()[:1]))
    assert {x.dtype for x in passed.hidden} == {jnp.dtype(jnp.bfloat16)}
    ours = np.concatenate([np.asarray(jax.jit(passed.head)(passed.read(), x)) for x in passed.hidden])
    want = hf.logits(theirs(source, torch.bfloat16), TOKENS)
    assert np.mean((ours - want) ** 2) <= 0.03**2 * np.mean(want**2)


def test_files_keep_the_dtype_of_every_tensor(tmp_path):
    source = saved(tmp_path, *CASES[0])
    prune_model(source, tmp_path / "out", method=Magnitude(), pattern=Unstructured(0.5))
    before, after = bridged.tensors(source), bridged.tensors(tmp_path / "out")
    assert len({values.dtype for values in before.values()}) == 2
    assert {key: values.dtype for key, values in after.items()} == {key: v.dtype for key, v in before.items()}
