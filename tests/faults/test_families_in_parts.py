"""A part of a model of every family: transformers loads it and computes the same, or it is refused with the reason."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.checkpoints import formats, load
from jprune.errors import JpruneError
from jprune.models import decoder, families
from jprune.models.parameters import parameters

pytest.importorskip("torch")
import hf_families

TOKENS = np.random.default_rng(1).integers(0, hf_families.VOCAB, (1, 20), dtype=np.int32)
# What is refused, and why: transformers' classes have no way to say it, or the family derives more from its sizes.
NO_HEAD_DIM = dict.fromkeys(("heads", "hidden"), "makes its heads hidden_size / num_attention_heads wide")
SCALED = {"hidden": "derives embed_scale from its sizes"}
REFUSED = {
    "OPTForCausalLM": NO_HEAD_DIM,
    "BloomForCausalLM": NO_HEAD_DIM | {"channels": r"is 4 \* hidden_size = 64 wide", "heads": "ALiBi's slopes"},
    **dict.fromkeys(("GPT2LMHeadModel", "GPTNeoXForCausalLM", "GPTJForCausalLM"), NO_HEAD_DIM),
    **dict.fromkeys(("FalconForCausalLM", "StableLmForCausalLM", "OlmoeForCausalLM"), NO_HEAD_DIM),
    **dict.fromkeys(("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"), SCALED),
}


@pytest.fixture
def whole(request, tmp_path):
    """A random model of an architecture, as transformers saves it."""
    family = families.ARCHITECTURES[request.param]
    model = hf_families.model(request.param, hf_families.sizes(family) | family.variants[-1])
    return load(hf_families.save(model, tmp_path / "whole"))


def part(checkpoint, what):
    """Every third channel of one layer; one of two key/value heads with its query heads; half the hidden dimensions."""
    config = checkpoint.config
    group = config.heads // config.kv_heads
    wanted = {
        "channels": {"d_ff": range(0, config.d_ff, 3)},
        "heads": {"heads": range(group, 2 * group), "kv_heads": range(1, 2)}
        if config.kv_heads > 1
        else {"heads": range(group // 2)},
        "hidden": {"d_model": range(0, config.d_model, 2)},
    }[what]
    keep = {
        path: {axis: wanted[name] for axis, name in enumerate(names) if name in wanted}
        for path, names in parameters(config).items()
    }
    return checkpoint.select(keep, (1,) if what == "channels" else None)


@pytest.mark.parametrize("whole", families.ARCHITECTURES, indirect=True)
def test_a_part_of_a_model(whole, tmp_path):
    import transformers

    view, refused = whole, {}
    for what in ("channels", "heads", "hidden"):
        try:
            smaller = part(view, what)
            formats.check(smaller, "hf")
            view = smaller
        except JpruneError as error:
            refused[what] = str(error)
    expected = REFUSED.get(whole.config.architecture, {})
    assert refused.keys() == expected.keys()
    for what, message in refused.items():
        assert re.search(expected[what], message)
    out = tmp_path / "out"
    out.mkdir()
    formats.write(out, view)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    params = trees.unflatten({path: jnp.asarray(view.read(path)) for path in view.shapes})
    ours = np.asarray(jax.jit(lambda p, t: decoder.apply(view.config, p, t))(params, jnp.asarray(TOKENS)))
    theirs = hf_families.logits(model, TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=1e-4)
