"""Channels go inside experts, in every family that has some: transformers loads the result, and runs go on."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
import bridged
import hf_families as hf

from jprune.checkpoints import load
from jprune.pipeline.shrink.run import shrink_model
from jprune.structured import LLMPruner
from jprune.structured.selection import Target

HALF = {"target": Target(units=0.5), "calibration": hf.tokens(40, batch=16)}
BOTH = {"moe_intermediate_size": 12, "intermediate_size": 16}
NUMBERS = {
    "Mixtral-0": {"intermediate_size": 16, "num_key_value_heads": 1},
    "Qwen2Moe-1": BOTH | {"shared_expert_intermediate_size": 8},
    "Qwen3Moe-1": BOTH | {"num_key_value_heads": 1},
    "GraniteMoe-1": {"intermediate_size": 16},
    "Olmoe-0": {"intermediate_size": 16, "num_key_value_heads": 2},
    "Glm4Moe-1": BOTH | {"n_shared_experts": 2},
    "DeepseekV2-0": {"moe_intermediate_size": 12},
    "DeepseekV3-1": BOTH | {"num_attention_heads": 2},
    "GptOss-0": {"intermediate_size": 16, "num_local_experts": 4},
}
"""What config.json says afterwards, where MLPs had 28 channels and experts 20, or 28 if one number is for both."""
HEADS_STAY = ("Olmoe-0", "DeepseekV2-0", "DeepseekV3-1")
"""Where transformers' class derives their width, and where they have several."""


@pytest.mark.parametrize("name", NUMBERS)
def test_transformers_loads_what_is_left(name, tmp_path):
    """Heads too, shared experts, and dense layers beside the experts."""
    folder = hf.save(hf.make(name), tmp_path / "source")
    method = LLMPruner(heads="none" if name in HEADS_STAY else "kv_head", uniform=True, round_to=4)
    report = shrink_model(folder, tmp_path / "out", method=method, **HALF)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in NUMBERS[name]} == NUMBERS[name]
    assert {
        sizes["d_shared"] / sizes["d_expert"]
        for sizes in report.sizes
        if "n_shared_experts" in config and "experts" in sizes
    } <= {1, 2}
    after, theirs = load(tmp_path / "out"), bridged.theirs(tmp_path / "out")
    np.testing.assert_allclose(
        bridged.logits(after, HALF["calibration"]), hf.logits(theirs, HALF["calibration"]), atol=1e-4
    )


def test_steps_end_where_one_does(tmp_path):
    """Weights of a channel do not change when others go, so that scores by weights leave the same."""
    folder = hf.save(hf.make("Mixtral-0"), tmp_path / "source")
    for steps in (1, 3):
        method = LLMPruner(importance="l2", heads="none", uniform=True, compensate=False, steps=steps)
        shrink_model(folder, tmp_path / str(steps), method=method, **HALF)
    once, thrice = (bridged.tensors(tmp_path / name) for name in "13")
    for key, values in once.items():
        np.testing.assert_array_equal(thrice[key], values, err_msg=key)


def test_layers_may_differ(tmp_path):
    """Ranked together, so that jprune alone loads it, by the sizes of each layer; what is written is a part of it."""
    folder = hf.save(hf.make("Qwen2Moe-0"), tmp_path / "source")
    method = LLMPruner(globally=True, importance="param_first", heads="none", protect_first=0, protect_last=0)
    report = shrink_model(folder, tmp_path / "out", method=method, **HALF)
    out = load(tmp_path / "out")
    assert out.sizes == report.sizes
    assert not out.config.uniform
    assert out.parameters == report.parameters[1] < report.parameters[0]
    assert np.isfinite(bridged.logits(out, HALF["calibration"])).all()


def test_goes_on_to_the_same_bits(tmp_path):
    """Stopped within the second block, with channels chosen for each expert by itself."""
    folder = hf.save(hf.make("Mixtral-0"), tmp_path / "source")
    method = LLMPruner(uniform=True, importance="l2")

    def stop(step):
        if step.phase == "prune" and step.done > 1:
            raise KeyboardInterrupt

    shrink_model(folder, tmp_path / "whole", method=method, **HALF)
    with pytest.raises(KeyboardInterrupt):
        shrink_model(folder, tmp_path / "out", method=method, progress=stop, **HALF)
    shrink_model(folder, tmp_path / "out", method=method, resume=True, **HALF)
    whole, resumed = (bridged.tensors(tmp_path / name) for name in ("whole", "out"))
    for key, values in whole.items():
        assert resumed[key].tobytes() == values.tobytes(), key
