"""`jprune tune` as a user types it."""

import json

import jax
import pytest

from jprune.cli import main
from jprune.train import sharding


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written into the user's cache; one device compiles faster than four."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", str(tmp_path / "cache"))
    monkeypatch.setattr(sharding, "make_mesh", lambda **options: None)


@pytest.fixture
def run(capsys):
    """Runs the command; gives (exit status, stdout, stderr)."""

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_tune_prints_one_json_object(run, tiny_model, token_file, tmp_path):
    folder = tiny_model()
    words = [
        "tune", "lora", folder, "--data", token_file(8, 12), "--steps", "2", "--batch-size", "4", "--rank", "2",
        "--alpha", "8", "--dropout", "0", "--targets", "q,v", "--learning-rate", "1e-3", "--out", tmp_path / "out",
    ]  # fmt: skip
    status, out, err = run(*words, "--evaluate", token_file(2, 12, seed=1), "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result["method"] == "lora"
    assert result["steps"] == 2
    assert result["tokens_per_second"] > 0
    assert set(result["perplexity"]) == {"before", "after", "sequence_length", "windows"}
    assert run(*words)[0] == 1  # it exists
    status, out, err = run("info", tmp_path / "out", "--json")
    assert status == 0


def test_bad_words(run, tiny_model, token_file, tmp_path):
    folder, records = tiny_model(), tmp_path / "records.jsonl"
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    records.write_text(json.dumps({"instruction": "w1 w2"}) + "\n")
    out = ["--out", tmp_path / "out"]

    def fails(*words, match):
        status, printed, err = run("tune", *words)
        assert (status, printed) == (1, ""), err
        assert err.count("\n") == 1
        assert match in err

    fails("lora", folder, "--data", records, *out, match="output")
    fails("lora", folder, "--data", token_file(2, 12), *out, match="too little to train on")
    few = ["--data", token_file(8, 12), "--batch-size", "4"]
    fails("lora", folder, *few, "--targets", "w", *out, match="'w' matches no kernel")
    fails("full", folder, *few, "--hidden-loss", "1.0", *out, match="give --teacher")
    assert not (tmp_path / "out").exists()
    assert run("tune", "lora", folder, *out)[0] == 2  # no --data
    status, printed, _ = run("tune", "full", "--help")
    assert status == 0
    assert "--teacher" in printed
