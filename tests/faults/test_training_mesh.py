"""Training over several devices: whatever is trained, the losses are those of one."""

import json

import numpy as np
import pytest
from two_domains import OPTIONS

from jprune.checkpoints import load
from jprune.pipeline.options import DynamicLoading
from jprune.pipeline.training import loraprune_model, shear_model, tune_model
from jprune.tuning import Full, Lora, LoRAPrune, Shearing

TARGET = "layers=2,hidden=24,heads=2,kv_heads=1,intermediate=40"
QUICK = {"batch_size": 4, "micro_batch": 2, "warmup": 0, "mask_momentum": 0.0}
SHORT = {"steps": 6, "every": 2, "batch_size": 4, "micro_batch": 4, "warmup": 0, "rank": 2, "learning_rate": 0.02}


def test_tuning(tiny_model, learnable, tmp_path, four_devices):
    """Two epochs of three batches; parameters cut up over two of four devices."""
    folder = tiny_model()
    options = {"method": Lora(batch_size=4, micro_batch=4, rank=2, epochs=2, dropout=0.0), "data": learnable}
    one = tune_model(folder, tmp_path / "one", **options)
    assert one.steps == 6
    with four_devices():
        four = tune_model(folder, tmp_path / "four", fsdp=2, **options)
    np.testing.assert_allclose(four.losses, one.losses, rtol=1e-4)


def test_loraprune(tiny_model, learnable, tmp_path, four_devices):
    """Kernels, importance and masks cut up over two of four devices."""
    folder = tiny_model()
    options = {"method": LoRAPrune(**SHORT | {"steps": 4}, ratio=0.5, dropout=0.0), "data": learnable}
    one = loraprune_model(folder, tmp_path / "one", **options)
    with four_devices():
        four = loraprune_model(folder, tmp_path / "four", fsdp=2, **options)
    np.testing.assert_allclose(four.losses, one.losses, rtol=1e-4)
    a, b = (json.loads((tmp_path / name / "jprune.json").read_text())["kept"] for name in ("one", "four"))
    assert a == b


def test_domains(tiny_model, tmp_path, four_devices):
    """Parameters and the reference model's cut up over two of four devices; draws, losses and weights are the same."""
    folder = tiny_model()
    method = Full(steps=2, batch_size=8, micro_batch=8, warmup=0, learning_rate=0.01)
    loading = DynamicLoading(reference=str(tiny_model("reference")))
    options = OPTIONS | {"method": method, "dynamic_loading": loading, "evaluate_every": 1}
    one = tune_model(folder, tmp_path / "one", **options)
    with four_devices():
        four = tune_model(folder, tmp_path / "four", fsdp=2, **options)
    np.testing.assert_allclose(four.losses, one.losses, rtol=1e-4)
    for name, found in one.domains.items():
        assert four.domains[name]["epochs"] == found["epochs"]
        np.testing.assert_allclose(four.domains[name]["weight"]["last"], found["weight"]["last"], rtol=1e-4)
        np.testing.assert_allclose(four.domains[name]["reference_loss"], found["reference_loss"], rtol=1e-5)


def test_shearing(tiny_model, learnable, tmp_path, four_devices):
    """Two by two devices, parameters cut up over two of them: the same masks are drawn and the same losses come out."""
    checkpoint = load(tiny_model())
    method = Shearing(target=TARGET, steps=2, **QUICK | {"micro_batch": 4})
    one = shear_model(checkpoint, tmp_path / "one", method=method, data=learnable)
    with four_devices():
        four = shear_model(checkpoint, tmp_path / "four", method=method, data=learnable, fsdp=2)
    np.testing.assert_allclose(four.losses, one.losses, rtol=1e-5)
    assert four.expected == pytest.approx(one.expected, abs=1e-2)
