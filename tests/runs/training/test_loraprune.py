"""LoRAPrune runs over a tiny model: what goes, what is refused."""

import json

import numpy as np
import pytest

import jprune
from jprune.errors import JpruneError
from jprune.pipeline.training import loraprune_model, plan_loraprune
from jprune.tuning import LoRAPrune

SHORT = {"steps": 6, "every": 2, "batch_size": 4, "micro_batch": 4, "warmup": 0, "rank": 2, "learning_rate": 0.02}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def test_a_run(tiny_model, learnable, tmp_path):
    """The last layer is protected; of the others a KV head of two and 28 of 56 channels go."""
    folder = tiny_model()
    method = LoRAPrune(**SHORT, ratio=0.5)
    report = loraprune_model(folder, tmp_path / "out", method=method, data=learnable, evaluate=learnable[:4])
    before, after = jprune.load(folder), jprune.load(tmp_path / "out")
    assert [(s["heads"], s["kv_heads"], s["d_ff"]) for s in report.sizes] == [(2, 1, 28), (2, 1, 28), (4, 2, 56)]
    assert after.shapes["blocks/1/attn/q/kernel"].shape == (32, 2, 8)
    lost = 2 * (32 * 8 * (2 + 1 + 1 + 2) + 28 * 3 * 32)
    assert (report.parameters - report.parameters_after, report.pruned) == (lost, (2 * 29, 2 * 58))
    assert report.trainable_parameters == 3 * 2 * (32 + 32 + 2 * (32 + 16) + 32 + 32 + 3 * (32 + 56))
    assert report.losses[-1] < report.losses[3]  # recovers
    for path in ("embed/embedding", "blocks/2/attn_norm/scale"):
        np.testing.assert_array_equal(before.read(path), after.read(path))
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert record["recipe"]["ratio"] == 0.5
    assert (record["schedule"]["begin"], record["schedule"]["end"]) == (0, 5)
    assert set(record["kept"]) == {f"blocks/{i}/{kind}" for i in (0, 1) for kind in ("attention", "mlp")}
    assert [len(units) for units in record["kept"].values()] == [1, 28, 1, 28]
    assert record["perplexity"]["before"] != record["perplexity"]["after"] == report.after.value
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    pruned = [line["pruned"] for line in lines]
    # 29 of 58 in each layer; after steps 2 and 4, 28 (1 - (3/5)^3) and 28 (1 - (1/5)^3) channels and the head.
    np.testing.assert_allclose(pruned, [0, 23 / 58, 23 / 58, 29 / 58, 0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(lines[1]["ratio"], 0.5 * (1 - 0.6**3), atol=1e-6)
    assert not (tmp_path / "out.run").exists()
    # What was cut stems from where it was, but for what the adapters added.
    kept = np.array(record["kept"]["blocks/1/mlp"])
    added = after.read("blocks/1/mlp/up/kernel") - before.read("blocks/1/mlp/up/kernel")[:, kept]
    assert np.linalg.matrix_rank(added, tol=1e-4) <= 2


def test_divergence_keeps_the_last_good_state(tiny_model, learnable, tmp_path):
    method = LoRAPrune(**SHORT | {"learning_rate": 1e38}, ratio=0.5)
    with pytest.raises(JpruneError, match=r"at step 2 the loss is .* before it, after 1 steps, are kept"):
        loraprune_model(tiny_model(), tmp_path / "out", method=method, data=learnable)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.run" / "step-00000001").exists()


def test_plan(tiny_config, tiny_model, tmp_path):
    """From a config alone; --uniform gives layers of one size."""
    folder = tmp_path / "config only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config))
    plan = plan_loraprune(folder, method=LoRAPrune(ratio=0.5))
    assert [s["d_ff"] for s in plan.sizes] == [28, 28, 56]
    plan = plan_loraprune(folder, method=LoRAPrune(ratio=0.3, uniform=True))
    assert [(s["kv_heads"], s["d_ff"]) for s in plan.sizes] == [(2, 40)] * 3
    assert plan.parameters[0] - plan.parameters[1] == 3 * 16 * 3 * 32


def test_bad_input(tiny_model, tiny_config, learnable, tmp_path):
    folder = tiny_model()

    def refused(match, model=folder, **options):
        method = LoRAPrune(**{"ratio": 0.5} | SHORT | options.pop("method", {}))
        with pytest.raises(JpruneError, match=match):
            loraprune_model(model, tmp_path / "out", method=method, **{"data": learnable} | options)
        assert not (tmp_path / "out").exists()

    refused("too little to train on: it has 3 windows", data=learnable[:3])
    refused("of 6 steps 5 are there to prune in .* fewer than `every` 10", method={"every": 10})
    refused("a plain Hugging Face folder has one size for all layers", format="hf")
    refused("a share of 0.01 is less than one of any layer's", method={"ratio": 0.01})
    refused("first 2 and last 1 of 3 layers are protected", method={"protect_first": 2})
    (folder / "config.json").write_text(json.dumps(tiny_config | MIXTRAL))
    with pytest.raises(JpruneError, match="kernels of experts get no adapters"):
        plan_loraprune(folder, method=LoRAPrune(ratio=0.5))
    for options, match in [
        ({}, r"`ratio`\) or of weights \(`sparsity`"),
        ({"ratio": 0.5, "sparsity": 0.5}, "either a share of heads"),
        ({"ratio": 1.0}, "`ratio` lies between 0 and 1, got 1.0"),
        ({"sparsity": 0.0}, "`sparsity` lies between 0 and 1, got 0.0"),
        ({"ratio": 0.5, "every": 0}, "`every` must be at least 1"),
        ({"ratio": 0.5, "begin": 0.9, "end": 0.9}, "`begin` < `end`"),
        ({"ratio": 0.5, "protect_last": -1}, "`protect_last` must not be negative"),
        ({"sparsity": 0.5, "uniform": True}, "`uniform` is about the sizes"),
        ({"ratio": 0.5, "rank": 0}, "`rank` must be at least 1"),
    ]:
        with pytest.raises(JpruneError, match=match):
            LoRAPrune(**options)
