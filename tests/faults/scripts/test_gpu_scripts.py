"""The scripts for a GPU machine, tried where there is none: tiny kernels in Pallas' interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*command, cwd=ROOT, **environment):
    env = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpu_check(tmp_path):
    printed = run("bash", "scripts/gpu_check.sh", str(tmp_path), TINY="1", SECONDS_OF_BENCH="600", BACKENDS="pallas")
    assert ", 0 wrong" in printed
    decoded = json.loads((tmp_path / "decode_cpu.json").read_text())
    dense, *packed = decoded["rows"]
    assert [row["way"] for row in packed] == ["capped:4", "bitmap int8"]
    assert all(row["speedup"] == dense["milliseconds_a_step"] / row["milliseconds_a_step"] for row in packed)
    # Of the same weights: sums in another order; int8 rounds each of them.
    assert all(row["difference_of_logits"] < (0.05 if "int8" in row["way"] else 0.01) for row in packed)
    assert all(row["difference_of_logits"] > 0.001 for row in packed if "int8" in row["way"])
    assert dense["weight_bytes"] == 2 * (4 * 64 * 64 + 3 * 64 * 88)
    result = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert result["interpret"]
    assert result["tiny"]
    assert {row["format"] for row in result["rows"]} == {"capped:4", "bitmap"}
    assert result["not_reached"] == []
    for row in result["rows"]:
        assert row["speedup"] == pytest.approx(row["dense_microseconds"] / row["microseconds"])
        assert abs(row["measured_sparsity"] - row["sparsity"]) < 0.05
        assert row["byte_limit"] == pytest.approx(2 * row["shape"][0] * row["shape"][1] / row["bytes"])
    assert set(result["sweep"]) == {"given mask", "2:4"}
    assert result["machine"]["versions"]["jax"]
    # Nobody shall take such times for a measurement.
    assert "these times mean nothing" in printed
    assert (tmp_path / "kernels_cpu.svg").read_text().startswith("<svg")
    again = run(sys.executable, "scripts/kernel_report.py", str(tmp_path / "kernels_cpu.json"))
    assert again.strip() in printed


def test_tuning_fills_the_table(tmp_path):
    table = tmp_path / "table.json"
    table.write_text((ROOT / "pallas_kernels/table.json").read_text())
    options = ["--formats", "capped:4", "--batches", "16", "--tiny", "--interpret", "--table", str(table)]
    run(sys.executable, "scripts/tune_kernels.py", *options, PYTHONPATH=str(ROOT))
    devices = json.loads(table.read_text())["devices"]
    entry = devices["cpu"]["classes"]["capped:4 bfloat16 n=16 small"]
    assert entry["microseconds"] > 0
    assert entry["dense_microseconds"] > 0
    assert entry["rows"] in (64, 128)


def test_no_gpu_is_said_plainly():
    done = subprocess.run(
        [sys.executable, "scripts/check_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "run on a GPU; JAX has cpu here" in done.stderr


def test_the_packaged_table_has_no_entry_without_a_time():
    devices = json.loads((ROOT / "pallas_kernels/table.json").read_text())["devices"]
    for device in devices.values():
        for entry in device["classes"].values():
            assert entry["microseconds"] > 0
            assert entry["dense_microseconds"] > 0
