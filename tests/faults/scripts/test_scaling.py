"""The scripts behind the scaling and forecast tables of docs/large-models.md."""

import functools
import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jprune import devices


@pytest.fixture
def script(monkeypatch):
    """A script by its name, as a module."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[3] / "scripts")
    return importlib.import_module


def test_counted_by_hand(script):
    """A loop of products whose rows are shared out, and one sum over the devices after it."""
    counted = script("counted")
    mesh = devices.make_mesh(devices=jax.devices()[:2])
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x, w = jax.device_put(jnp.ones((8, 16)), cut), jax.device_put(jnp.ones((16, 16)), whole)

    def f(x, w):
        return jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x).T @ x

    with counted.Counted() as seen:
        run = jax.jit(f, out_shardings=whole)
        run(x, w), run(x, w)
        devices.moved(devices.moved(x, whole), cut)
        jax.device_put(x, whole)
    programs = [(name, counted.Program(text).work, count, runs) for name, text, count, runs in seen.programs]
    ((work, count, runs),) = [own for name, *own in programs if name == "f"]
    assert (count, runs) == (2, 2)
    assert work.flops["matmul"] == 5 * 2 * 4 * 16 * 16 + 2 * 16 * 4 * 16  # of a half of the rows
    assert work.flops["elements"] >= 5 * 4 * 16
    assert dict(work.sent) == {"all-reduce": 16 * 16 * 4}  # 2 (n - 1) / n of it
    assert seen.puts == {"through the host": 2 * 8 * 16 * 4}  # all of it to each device; `moved` needs no host
    assert sum(work.sent["all-gather"] for _, work, _, _ in programs) == 4 * 16 * 4


def test_branches_by_hand(script):
    """Products of three lengths, as often one as the other."""

    def f(i, a, b):
        lengths = [functools.partial(lambda n, a, b: a[:n].T @ b[:n], n) for n in (8, 16, 24)]
        return jax.lax.switch(i, lengths, a, b)

    text = jax.jit(f).lower(jnp.int32(0), jnp.ones((32, 16)), jnp.ones((32, 40))).compile().as_text()
    assert script("counted").Program(text).work.flops["matmul"] == 2 * 16 * 16 * 40


def test_a_run_over_two_devices(script, monkeypatch, tmp_path):
    words = ["--methods", "wanda", "--devices", "1", "2", "--shape", "tiny", "--divide", "1", "--windows", "16"]
    words += ["--sequence-length", "16", "--out", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", *words])
    script("bench_scaling").main()
    rows = {(row["scaling"], row["mesh"]): row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    # Of one block, which nobody needs the output of: q, k, v, o, gate, up, and attention without a causal half.
    kernels = 64 * (64 + 32 + 32 + 64 + 2 * 176)
    for key, windows in ((("strong", "1"), 16), (("strong", "2"), 8), (("weak", "1"), 2), (("weak", "2"), 2)):
        tokens = 16 * windows
        assert rows[key]["flops"]["calibration"]["matmul"] == 2 * tokens * kernels + 4 * tokens * 16 * 64
    assert rows["strong", "1"]["sent_bytes"] == {}
    two = rows["strong", "2"]
    assert two["sent_bytes"]["sums"]["all-reduce"] == 4 * (3 * 64 + 176 + 4)  # norms of four inputs, and their counts
    assert two["moved_bytes"].get("through the host", 0) == 0
    # What a device prunes it sends to the other, in float32 here.
    assert sum(kind.get("all-gather", 0) for kind in two["sent_bytes"].values()) == 4 * (kernels + 64 * 176) / 2


def test_forecast_against_runs(script):
    """Seconds are compared without what comes once: those of the blocks that the smallest run does not have."""
    said = {"peak_memory_bytes": 3 * 2**30, "cpu_seconds": 40.0}
    runs = [
        {"shape": "s", "blocks": 2, "peak_memory_bytes": 2**31, "cpu_seconds": 35.0, "planned": said},
        {"shape": "s", "blocks": 4, "peak_memory_bytes": 2**31, "cpu_seconds": 60.0, "planned": said},
    ]
    lines = script("bench_scale").table(runs).splitlines()
    assert lines[2] == "| s | 2 | 2.00 | 3.00 | 1.50 | 35 |  |  |  |"
    assert lines[3] == "| s | 4 | 2.00 | 3.00 | 1.50 | 60 | 25 | 20 | 0.80 |"


def test_shapes_of_random_checkpoints(script):
    make = script("make_checkpoint")
    config = make.divided(make.hf_config("llama", "moe-671b"), 8) | {"num_hidden_layers": 1}
    shapes = {path: value.shape for path, value in make.random_checkpoint(config).shapes.items()}
    assert shapes["blocks/0/mlp/experts/gate/kernel"] == (256, 896, 256)
    assert shapes["blocks/0/attn/q/kernel"] == (896, 16, 128)
    config = make.divided(make.hf_config("llama", "llama-70b"), 4)
    assert config["intermediate_size"] / config["hidden_size"] == 28672 / 8192
    assert config["hidden_size"] / config["num_attention_heads"] == 128
    assert config["num_attention_heads"] / config["num_key_value_heads"] == 8
