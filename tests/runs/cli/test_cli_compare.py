"""`jprune compare` as a user types it."""

import json
import math
import re

import numpy as np
import pytest

import jprune
from jprune.cli import main


@pytest.fixture
def said(capsys):
    """(exit status, stdout, stderr) of the command."""

    def run(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_models_against_the_first(said, tiny_model, token_file, tmp_path):
    """Numbers are those of `eval perplexity`, of a packed model too; a copy is not distinguishable."""
    dense, tokens = tiny_model(), token_file()
    jprune.prune_model(dense, tmp_path / "pruned", method=jprune.Magnitude(), pattern=jprune.Unstructured(0.75))
    jprune.pack(tmp_path / "pruned", tmp_path / "packed")
    models = (dense, tmp_path / "pruned", tmp_path / "packed")
    status, out, _ = said("compare", *models, "--text", tokens, "--json")
    result = json.loads(out)
    assert status == 0
    first, pruned, packed = result["models"]
    for model, own in zip(models, (first, pruned, packed)):
        measured = json.loads(said("eval", "perplexity", model, "--text", tokens, "--json")[1])
        assert own["perplexity"]["value"] == pytest.approx(measured["perplexity"], rel=1e-6)
        assert measured["sha256"] == result["sha256"]
        assert own["perplexity"]["low"] < own["perplexity"]["value"] < own["perplexity"]["high"]
    files = (tmp_path / "packed").glob("*.safetensors")
    assert packed["nbytes"] == sum(file.stat().st_size for file in files) < pruned["nbytes"]
    assert packed["divergence"] == pytest.approx(pruned["divergence"], rel=1e-5)
    assert pruned["divergence"]["low"] > 0
    assert pruned["tail"] > pruned["divergence"]["value"]
    ratio = math.log(pruned["perplexity"]["value"] / first["perplexity"]["value"])
    assert pruned["change"]["value"] == pytest.approx(ratio, abs=1e-6)
    kernels = [p for p in jprune.load(dense).shapes if p.startswith("blocks/") and p.endswith("kernel")]
    zeros = sum(int(np.sum(jprune.load(tmp_path / "pruned").read(p) == 0)) for p in kernels)
    assert pruned["sparsity"]["zeros"] == zeros
    page = tmp_path / "report.html"
    status, out, _ = said("compare", dense, tmp_path / "pruned", "--text", tokens, "--out", page)
    assert status == 0
    assert f"{pruned['perplexity']['value']:.3f}" in page.read_text()
    assert "method magnitude" in page.read_text(), "of the record beside the model"
    status, out, _ = said("compare", dense, dense, "--text", tokens)
    assert status == 0
    assert "not distinguishable" in out
    status, _, err = said("compare", dense, dense, "--text", tokens, "--out", page)
    assert (status, "exists; give another --out" in err) == (1, True)


def test_what_cannot_be_compared(said, tiny_model, token_file):
    dense, tokens = tiny_model(), token_file()
    status, _, err = said("compare", dense, "--text", tokens)
    assert status == 2
    assert "expected two models or more" in err
    words = ("compare", dense, tiny_model(name="other", vocab_size=97), "--text", tokens)
    status, _, err = said(*words)
    assert status == 1
    assert "one vocabulary, got 96 tokens and 97" in err
    status, _, err = said(*words, "--prompt", "w5")
    assert (status, "has no tokenizer to read prompts" in err) == (1, True), "before anything is measured"
    status, _, err = said(*words, "--limit", 5)
    assert (status, "say how --tasks are asked; give --tasks" in err) == (2, True)


def test_the_report_of_a_run(said, tiny_model, token_file, tmp_path):
    """Its numbers are those of the run and of `compare`; where it fails, the result is there all the same."""
    dense, tokens, out = tiny_model(), token_file(), tmp_path / "pruned"
    words = ("prune", "magnitude", dense, "--sparsity", "0.75", "--evaluate", tokens)
    status, told, err = said(*words, "--out", out, "--report", "--json")
    assert status == 0
    assert "has no tokenizer: the report has no text" in err
    result = json.loads(told)
    assert result["report"] == str(out / "report.html")
    page = (out / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    measured = result["perplexity"]
    assert [own["perplexity"]["value"] for own in data["models"]] == pytest.approx(
        [measured["before"], measured["after"]], rel=1e-6
    )
    assert (data["windows"], data["sequence_length"]) == (measured["windows"], measured["sequence_length"])
    assert data["records"][1]["recipe"]["method"] == "magnitude"
    assert said("info", out, "--verify")[0] == 0
    # A model that `load` refuses: the failure is the report's alone.
    status, told, err = said(*words, "--out", tmp_path / "other", "--report", "--evaluate", "pydoc", "--json")
    assert status == 1, "pydoc is text, and the model has no tokenizer: the run itself needs one"
    status, told, err = said(*words[:5], "--out", tmp_path / "other", "--report", "--json")
    assert status == 0
    assert json.loads(told)["report"] is None
    assert "but its report could not be made: pydoc is text" in err
    assert jprune.load(tmp_path / "other").config == jprune.load(out).config
