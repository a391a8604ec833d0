"""Structured runs that are refitted: interrupted and resumed, too large for the memory, in steps, in every format."""

import json

import numpy as np
import pytest

from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.pipeline.shrink.plan import plan_shrink
from jprune.pipeline.shrink.run import shrink_model
from jprune.structured import LLMPruner
from jprune.structured.selection import Target

METHOD = LLMPruner(importance="l2", protect_first=0, protect_last=0)
TOKENS = np.random.default_rng(1).integers(0, 96, (8, 24), dtype=np.int32)
HALF = {"target": Target(units=0.5), "calibration": TOKENS}


@pytest.fixture
def checkpoint(tiny_model):
    return load(tiny_model())


def weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("blocks", [0.5, 1, 2.7])
def test_goes_on_to_the_same_bits(checkpoint, tmp_path, blocks):
    """Stopped within a block, between two, and in the last one; and what was begun is not dropped unasked."""
    shrink_model(checkpoint, tmp_path / "whole", method=METHOD, **HALF)

    def stop(step):
        if step.phase == "prune" and step.done >= blocks:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="resume"):
        shrink_model(checkpoint, out, method=METHOD, progress=stop, **HALF)
    assert not out.exists()
    with pytest.raises(JpruneError, match="resume"):
        shrink_model(checkpoint, out, method=METHOD, **HALF)
    other = LLMPruner(importance="l1", protect_first=0, protect_last=0)
    with pytest.raises(JpruneError, match="the method"):
        shrink_model(checkpoint, out, method=other, resume=True, **HALF)
    report = shrink_model(checkpoint, out, method=METHOD, resume=True, **HALF)
    assert weights(out) == weights(tmp_path / "whole")
    assert report.own_json()["refitted"] == 6
    assert json.loads((out / "jprune.json").read_text())["resumed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


def test_without_memory_nothing_is_refitted(checkpoint, tmp_path):
    plain = LLMPruner(importance="l2", protect_first=0, protect_last=0, compensate=False)
    report = shrink_model(checkpoint, tmp_path / "out", method=METHOD, memory=1000, **HALF)
    assert any("GB of memory" in notice for notice in report.notices)
    assert report.own_json()["refitted"] == 0
    shrink_model(checkpoint, tmp_path / "plain", method=plain, **HALF)
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    plan = plan_shrink(checkpoint, method=METHOD, memory=1000, **HALF)
    assert plan.refitting is None
    assert "GB of memory" in plan.notices[0]


def test_the_plan_says_what_it_takes(checkpoint):
    plan = plan_shrink(checkpoint, method=METHOD, **HALF)
    assert [k.path for k in plan.refitting.kernels[:2]] == ["blocks/0/attn/o/kernel", "blocks/0/mlp/down/kernel"]
    assert plan.refitting.tokens == TOKENS.size
    assert plan.refitting.flops > 0
    layers = LLMPruner(importance="l2", protect_first=0, protect_last=0, globally=True)
    assert len(plan_shrink(checkpoint, method=layers, **HALF).refitting.kernels) == 6
    channels = LLMPruner(importance="l2", mode="channel")
    assert plan_shrink(checkpoint, method=channels, **HALF).refitting is None


def test_steps_and_formats(checkpoint, tmp_path):
    """What goes in two steps is what stays in the end; Orbax holds what safetensors do."""
    method = LLMPruner(importance="l2", protect_first=1, protect_last=0, steps=2)
    for name, format in (("a", "jprune"), ("b", "orbax")):
        shrink_model(checkpoint, tmp_path / name, method=method, format=format, **HALF)
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert [s["d_ff"] for s in a.sizes] == [56, 28, 28]
    for path in a.shapes:
        np.testing.assert_array_equal(a.read(path), b.read(path))
    np.testing.assert_array_equal(a.read("blocks/0/mlp/down/kernel"), checkpoint.read("blocks/0/mlp/down/kernel"))
