"""Two processes with two CPU devices each, over the loopback: one result, whoever dies on the way."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import killable
import numpy as np
import pytest

import jprune
from jprune import SparseGPT, Unstructured, devices
from jprune.cli import main
from jprune.errors import JpruneError, UsageError
from jprune.pipeline import prune_model
from jprune.runs import processes
from jprune.runs.processes import Cluster

SCRIPT = pathlib.Path(__file__).parents[1] / "reference" / "one_of_many.py"
PATIENCE = 240
"""Seconds within which everything must end, also where somebody has died."""


@pytest.fixture
def run():
    """Runs `jprune` in two processes: the words of each, and when each dies. Gives exit status, stdout and stderr."""

    def run(words, *, others=None, die=("never", "never")):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        join = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
        both = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), at, *map(str, own), *join, str(i)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for i, (at, own) in enumerate(zip(die, (words, others or words), strict=True))
        ]
        try:
            said = [process.communicate(timeout=PATIENCE) for process in both]
        finally:
            for process in both:
                process.kill()
        return [(process.returncode, *streams) for process, streams in zip(both, said, strict=True)]

    return run


def test_killed_and_resumed(run, tiny_model, token_file, tmp_path):
    folder, tokens = tiny_model(num_hidden_layers=3), token_file(8)
    words = ["prune", "sparsegpt", folder, "--sparsity", "0.5", "--calibration", tokens]
    first, second = run([*words, "--out", tmp_path / "whole"])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "written to" in first[1]
    assert "written to" not in second[1] + second[2]

    prune_model(
        folder,
        tmp_path / "one",
        method=SparseGPT(),
        pattern=Unstructured(0.5),
        calibration=tokens,
        mesh=devices.make_mesh(devices=jax.devices()[:1]),
    )
    together, alone = jprune.load(tmp_path / "whole"), jprune.load(tmp_path / "one")
    for path in alone.shapes:
        a, b = alone.read(path), together.read(path)
        np.testing.assert_array_equal(a == 0, b == 0, err_msg=path)
        np.testing.assert_allclose(b, a, atol=1e-5, rtol=0, err_msg=path)
    assert json.loads((tmp_path / "whole" / "jprune.json").read_text())["machine"]["processes"] == 2

    words += ["--out", tmp_path / "out", "--resume"]
    first, second = run(words, die=("never", "1.2"))  # a worker dies
    assert second[0] == -signal.SIGKILL
    assert first[0] == 1
    assert "jprune: another process of this run has ended" in first[2]
    assert "go on with the same command and --resume" in first[2]
    first, second = run(words, die=("2.2", "never"))  # the coordinator dies: JAX may end the other before we do
    assert first[0] == -signal.SIGKILL
    assert second[0] in (1, -signal.SIGABRT)
    assert "another process of this run has ended" in second[2] or "another task died" in second[2]
    assert not (tmp_path / "out").exists()
    first, second = run(words)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert killable.digest(tmp_path / "out") == killable.digest(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "jprune.json").read_text())["resumed"] is True
    assert not list(tmp_path.glob("out.run"))


def test_experts_and_outputs_over_two_processes(run, tiny_model, token_file, tmp_path, capsys):
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    folder, tokens = tiny_model(architectures=["MixtralForCausalLM"], model_type="mixtral", **sizes), token_file(6)
    words = ["prune", "wanda", folder, "--pattern", "2:4", "--calibration", tokens, "--expert-tokens", "40"]
    words += ["--evaluate", tokens, "--report", "--json", "--out"]
    first, second = run([*words, tmp_path / "two", "--model-axis", "4"])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert main([*map(str, words), str(tmp_path / "one")]) == 0
    perplexities = [json.loads(out.splitlines()[-1])["perplexity"] for out in (first[1], capsys.readouterr().out)]
    assert perplexities[0]["before"] == pytest.approx(perplexities[1]["before"], rel=1e-6)
    assert perplexities[0]["after"] == pytest.approx(perplexities[1]["after"], rel=1e-5)
    assert not any(line.startswith("{") for line in second[1].splitlines())
    page = (tmp_path / "two" / "report.html").read_text()  # of both processes' windows, by one of them
    assert json.loads(first[1].splitlines()[-1])["report"] == str(tmp_path / "two" / "report.html")
    assert f"{perplexities[0]['before']:.2f}" in page
    assert f"{perplexities[0]['after']:.2f}" in page
    one, two = jprune.load(tmp_path / "one"), jprune.load(tmp_path / "two")
    for path in one.shapes:
        np.testing.assert_array_equal(one.read(path), two.read(path), err_msg=path)


def test_what_all_must_know(run, tiny_model, token_file, tmp_path):
    """Processes that are given different things, or of which one cannot go on, all end and say why."""
    folder = tiny_model(num_hidden_layers=1)
    words = ["prune", "magnitude", folder, "--out", tmp_path / "out", "--sparsity"]
    for status, _, error in run([*words, "0.5"], others=[*words, "0.6"]):
        assert status == 1
        assert "process 1 and process 0 differ in the pattern" in error
    gone = ["eval", "perplexity", tmp_path / "nowhere", "--text", token_file()]
    here = ["eval", "perplexity", folder, "--text", token_file()]
    first, second = run(here, others=gone)
    assert (first[0], second[0]) == (1, 1)
    assert "process 1: " in first[2]
    assert "nowhere" in first[2]
    assert "nowhere" in second[2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--coordinator", "h:1"], "go together"),
        (["--process-id", "0"], "go together"),
        (["--coordinator", "h:1", "--process-id", "2", "--num-processes", "2"], "in [0, 2)"),
        (["--coordinator", "h:1", "--process-id", "-1", "--num-processes", "2"], "in [0, 2)"),
        (["--coordinator", "h", "--process-id", "0", "--num-processes", "2"], "HOST:PORT"),
        (["--coordinator", "h:x", "--process-id", "0", "--num-processes", "2"], "HOST:PORT"),
        (["--coordinator", "h:1", "--process-id", "0", "--num-processes", "2", "--distributed"], "not both"),
    ],
)
@pytest.mark.parametrize("command", [["eval", "perplexity"], ["prune", "magnitude"]], ids=" ".join)
def test_words_that_make_no_cluster(command, words, said, capsys):
    assert main([*command, "model", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_model_axis_that_does_not_fit(tiny_model, token_file, capsys, four_devices):
    words = ["eval", "perplexity", str(tiny_model()), "--text", token_file(), "--model-axis", "3"]
    with four_devices():
        assert main(words) == 1
    assert "got 3, and there are 4 devices" in capsys.readouterr().err


def test_a_coordinator_that_is_not_there(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(JpruneError, match=rf"coordinator 127.0.0.1:{port} could not be reached"):
        Cluster(coordinator=f"127.0.0.1:{port}", process_id=1, num_processes=2).start()


def test_no_cluster_to_be_found():
    with pytest.raises(JpruneError, match="no cluster was found"):
        Cluster().start()
    with pytest.raises(UsageError, match="go together"):
        Cluster(coordinator="127.0.0.1:1", process_id=0)


def test_one_process_agrees_with_itself():
    assert processes.gathered({"a": 1}) == [{"a": 1}]
    assert processes.decided_by_first(lambda: [1, 2]) == [1, 2]
    assert processes.is_first()
    processes.check_alike({"x": 1})
    with pytest.raises(JpruneError, match="mine"), processes.run_together():
        raise JpruneError("mine")
    assert processes.own_part() == ""
    assert processes.lost(jax.errors.JaxRuntimeError("INTERNAL: x")) is None
