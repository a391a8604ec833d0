"""Scripts, run in this process."""

import importlib
import json
import pathlib
import sys

import jax
import pytest

from jprune.cli.main import main


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs `main` of a script with some words; gives its module.

    The commands that it starts run in this process too: what another one would import and compile again takes longer
    than all that they do.
    """
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[3] / "scripts")

    def command(*words):
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return {
            **json.loads(capsys.readouterr().out.splitlines()[-1]),
            "process_seconds": 1.0,
            "processor_seconds": 1.0,
        }

    def run(name, *words):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "jprune", command)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        with jax.numpy_dtype_promotion("standard"):  # as in a process of its own
            module.main()
        return module

    return run
