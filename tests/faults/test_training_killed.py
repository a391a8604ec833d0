"""Training runs that are killed and resumed: tuning, LoRAPrune, and rounds of pruning and tuning."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from sparse_model import sparse

import jprune
from jprune.errors import JpruneError
from jprune.pipeline import prune_and_tune
from jprune.pipeline.training import loraprune_model, tune_model
from jprune.tuning import Full, Lora, LoRAPrune

TUNING = {"steps": 4, "batch_size": 4, "micro_batch": 4, "warmup": 0}
PRUNING = {"steps": 6, "every": 2, "batch_size": 4, "micro_batch": 4, "warmup": 0, "rank": 2, "learning_rate": 0.02}
ROUND = {"steps": 3, "batch_size": 4, "micro_batch": 4, "learning_rate": 0.01}


def test_tuning(tiny_model, learnable, tmp_path):
    folder = sparse(tiny_model())
    np.save(tmp_path / "data.npy", learnable)
    program = f"""
import os, signal
from jprune import Lora, tune_model
def kill(p):
    if p.phase == "train" and p.done >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
options = {{"checkpoint_every": 2, "progress": kill, "data": {str(tmp_path / "data.npy")!r}}}
tune_model({str(folder)!r}, {str(tmp_path / "out")!r}, method=Lora(**{TUNING!r}, rank=2), **options)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    options = {"data": str(tmp_path / "data.npy"), "checkpoint_every": 2}
    with pytest.raises(JpruneError, match="a run that has not finished; go on with `resume`"):
        tune_model(folder, tmp_path / "out", method=Lora(**TUNING, rank=2), **options)
    again = tune_model(folder, tmp_path / "out", method=Lora(**TUNING, rank=2), resume=True, **options)
    whole = tune_model(folder, tmp_path / "whole", method=Lora(**TUNING, rank=2), **options)
    assert again.resumed_from == 2
    assert again.losses == whole.losses
    a, b = jprune.load(tmp_path / "out"), jprune.load(tmp_path / "whole")
    for path in a.shapes:
        np.testing.assert_array_equal(a.read(path), b.read(path))


def test_loraprune(tiny_model, learnable, tmp_path):
    """From the checkpoint in the midst of pruning to the same units and the same weights."""
    folder = tiny_model()
    np.save(tmp_path / "data.npy", learnable)
    program = f"""
import os, signal
from jprune import LoRAPrune, loraprune_model
def kill(p):
    if p.phase == "train" and p.done >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
options = {{"checkpoint_every": 3, "progress": kill, "data": {str(tmp_path / "data.npy")!r}}}
loraprune_model({str(folder)!r}, {str(tmp_path / "out")!r}, method=LoRAPrune(**{PRUNING!r}, ratio=0.5), **options)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    options = {"data": str(tmp_path / "data.npy"), "checkpoint_every": 3}
    with pytest.raises(JpruneError, match=r"was begun with ratio = 0\.5"):
        loraprune_model(folder, tmp_path / "out", method=LoRAPrune(**PRUNING, ratio=0.4), resume=True, **options)
    method = LoRAPrune(**PRUNING, ratio=0.5)
    again = loraprune_model(folder, tmp_path / "out", method=method, resume=True, **options)
    whole = loraprune_model(folder, tmp_path / "whole", method=method, **options)
    assert again.resumed_from == 3
    assert again.losses == whole.losses
    a, b = (json.loads((tmp_path / name / "jprune.json").read_text())["kept"] for name in ("out", "whole"))
    assert a == b
    models = jprune.load(tmp_path / "out"), jprune.load(tmp_path / "whole")
    for path in models[0].shapes:
        np.testing.assert_array_equal(*(model.read(path) for model in models))


PROGRAM = """
import os, signal, sys
import jprune
from jprune.pipeline import prune_and_tune
from jprune.tuning import Full
phase, done = sys.argv[1], float(sys.argv[2])
def kill(p):
    if p.phase == phase and p.done >= done:
        os.kill(os.getpid(), signal.SIGKILL)
prune_and_tune(progress=kill, **{options!r}, method=jprune.Wanda(), tuning=Full(**{short!r}))
"""


def test_any_round(tiny_model, token_rows, tmp_path):
    """Each process dies a little later than the one before: while pruning, while training, between the two."""
    np.save(tmp_path / "evaluate.npy", token_rows["evaluate"])
    options = {**token_rows, "model": str(tiny_model()), "sparsity": 0.6, "rounds": (0.3, 0.6), "checkpoint_every": 1}
    options["evaluate"] = str(tmp_path / "evaluate.npy")
    out = tmp_path / "out"
    program = PROGRAM.format(options={**options, "out": str(out), "resume": True}, short=ROUND)
    options["method"] = jprune.Wanda()
    whole = prune_and_tune(out=tmp_path / "whole", tuning=Full(**ROUND), **options)
    cached = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for phase, done in [("1/2 train", 2.0), ("2/2 prune", 1.5), ("2/2 train", 2.0)]:
        words = [sys.executable, "-c", program, phase, str(done)]
        died = subprocess.run(words, capture_output=True, text=True, check=False, env=cached | os.environ)
        assert died.returncode == -signal.SIGKILL, (phase, died.stderr)
        assert not out.exists()
    with pytest.raises(JpruneError, match="a run that has not finished; go on with `resume`"):
        prune_and_tune(out=out, tuning=Full(**ROUND), **options)
    with pytest.raises(JpruneError, match="was begun with steps = 3 and cannot go on with 4"):
        prune_and_tune(out=out, tuning=Full(**ROUND | {"steps": 4}), resume=True, **options)
    seen = []
    again = prune_and_tune(out=out, tuning=Full(**ROUND), resume=True, progress=seen.append, **options)
    assert {p.phase.split()[0] for p in seen} == {"2/2"}  # the first round is not done again
    a, b = jprune.load(tmp_path / "whole"), jprune.load(out)
    for path in a.shapes:
        np.testing.assert_array_equal(a.read(path), b.read(path), err_msg=path)
    for one, other in zip(whole.rounds, again.rounds, strict=True):
        times = {"prune_seconds": 0.0, "tune_seconds": 0.0}
        assert dataclasses.replace(one, **times) == dataclasses.replace(other, **times)
    assert not (tmp_path / "out.run").exists()
    # Killed after the result got its name, all that is left to do is to remove the folder.
    (tmp_path / "out.run").mkdir()
    assert prune_and_tune(out=out, tuning=Full(**ROUND), resume=True, **options).rounds == again.rounds
    assert not (tmp_path / "out.run").exists()
