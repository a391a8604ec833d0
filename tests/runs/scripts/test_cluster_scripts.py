"""What the examples for clusters start, with stand-ins for srun and gcloud."""

import os
import pathlib
import subprocess

import pytest

SCRIPTS = pathlib.Path(__file__).parents[3] / "scripts"


@pytest.fixture
def start(tmp_path):
    """Runs a script in which a program only tells its arguments and what GPUs JAX is to take."""

    def start(script, program, words, **environment):
        stand_in = tmp_path / program
        stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "gpus=$JAX_LOCAL_DEVICE_IDS"\n')
        stand_in.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", SCRIPTS / script, *words],
            env={"PATH": path, "PYTHON": "python", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return start


WORDS = ["wanda", "/shared/a model", "--pattern", "2:4", "--out", "/shared/out"]


def test_slurm(start):
    done = start("slurm_prune.sh", "srun", WORDS, SLURM_GPUS_ON_NODE="4")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[1:] == ["python", "-m", "jprune", "prune", *WORDS, "--distributed", "--resume", "gpus=0,1,2,3"]


def test_tpu_pod(start):
    done = start("tpu_pod_prune.sh", "gcloud", WORDS, TPU="slice", ZONE="zone")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[:4] == ["compute", "tpus", "tpu-vm", "ssh"]
    assert "--worker=all" in told
    command = told[told.index("--command") + 1]
    assert command.split(" wanda ")[0] == "python -m jprune prune"
    assert r"/shared/a\ model" in command
    assert command.strip().endswith("--distributed --resume")


@pytest.mark.parametrize(("script", "words"), [("slurm_prune.sh", []), ("tpu_pod_prune.sh", WORDS)])
def test_usage(start, script, words):
    done = start(script, "srun", words)
    assert done.returncode == 2
    assert "`jprune prune`" in done.stderr
