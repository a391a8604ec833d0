"""The generation benchmark runs, and its table is what it says."""

import json
import pathlib
import statistics
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[3] / "scripts" / "bench_generate.py"


def test_two_models(tiny_model, tmp_path):
    large, small = tiny_model("large"), tiny_model("small", per_layer_config={"1": {"intermediate_size": 8}})
    words = [str(small), "--baseline", str(large), "--prompt-length", "9", "--tokens", "3", "--repeats", "3", "--json"]
    words += ["--batch", "1", "2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words, "--out", tmp_path / "out.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert list(result["batches"]) == ["1", "2"]
    assert list(result["batches"]["2"]) == [str(large), str(small)]
    one, other = result["batches"]["2"].values()
    assert other["tokens_per_second"] == 2 / other["seconds"]["decode"]
    assert one["parameters"] - other["parameters"] == 3 * 32 * (56 - 8)
    assert other["file_bytes"] == (small / "model.safetensors").stat().st_size
    assert other["weight_bytes"] == 4 * other["parameters"]
    assert other["sizes"]["layers"][1]["d_ff"] == 8
    for part in ("prefill", "decode"):
        assert len(other["runs"][part]) == 3
        assert other["seconds"][part] == statistics.median(other["runs"][part]) > 0
        assert other["speedup"][part] == one["seconds"][part] / other["seconds"][part]
    assert other["peak_memory_bytes"] > 1e7
