"""`jprune tune` and `jprune prune loraprune` as a user types them."""

import json

import jax
import pytest

from jprune.cli import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", str(tmp_path / "cache"))


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


def test_prune_and_tune(run, tiny_model, token_file, tmp_path):
    """Its rounds and its plan as JSON; its own record as a recipe; the options that go with a pruner and a tuning."""
    folder, rows = tiny_model(), token_file(8, 12)
    words = ["prune", "prune-and-tune", folder, "--sparsity", "0.5", "--rounds", "0.25,0.5", "--pruner", "magnitude"]
    words += ["--tuning", "lora", "--steps", "2", "--batch-size", "4", "--rank", "2", "--tune-length", "12"]
    data = ["--data", rows, "--evaluate", token_file(2, 12, seed=1)]
    status, out, err = run(*words, "--plan", "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    assert plan["sparsities"] == [0.25, 0.5]
    assert plan["tuning_tokens"] == 2 * 4 * 12
    status, out, err = run(*words, *data, "--out", tmp_path / "out", "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert [(each["sparsity"], each["steps"]) for each in result["rounds"]] == [(0.25, 2), (0.5, 2)]
    assert result["sparsity"]["zeros"] == result["rounds"][-1]["zeros"]
    assert result["perplexity"]["after"] == result["rounds"][-1]["perplexity_tuned"]
    again = ["prune", "prune-and-tune", folder, "--recipe", tmp_path / "out" / "jprune.json"]
    status, out, err = run(*again, "--plan", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["sparsities"] == plan["sparsities"]
    assert json.loads(out)["tuning_tokens"] == plan["tuning_tokens"]

    for wrong, said in [
        (["--rounds", "0.5,x", *data, "--out", tmp_path / "no"], "are not sparsities"),
        (["--rounds", "0.2,0.4", *data, "--out", tmp_path / "no"], "end at 0.4"),
        (["--out", tmp_path / "no"], "--data SOURCE"),
    ]:
        status, out, err = run("prune", "prune-and-tune", folder, "--sparsity", "0.5", "--batch-size", "4", *wrong)
        assert status in (1, 2)
        assert said in err
    assert run(*words, "--damping", "0.1")[0] == 2  # goes with SparseGPT
    _, out, _ = run("prune", "prune-and-tune", "--help")
    assert "--damping" in out
    assert "--rank" not in out


def test_loraprune(run, tiny_model, token_file, tmp_path):
    folder, out = tiny_model(), tmp_path / "out"
    words = ["prune", "loraprune", folder, "--ratio", "0.5", "--protect-first", "1", "--protect-last", "0"]
    status, plan, _ = run(*words, "--plan", "--json")
    assert status == 0
    more = ["--steps", "4", "--every", "2", "--batch-size", "4", "--rank", "2", "--data", token_file(8, 12)]
    status, printed, err = run(*words, *more, "--out", out, "--evaluate", token_file(2, 12, seed=1))
    assert status == 0, err
    assert "58 of 116 heads and channels went; parameters: " in printed
    assert "only jprune loads this folder" in err
    status, info, _ = run("info", out, "--json")
    assert json.loads(info)["parameters"] == json.loads(plan)["parameters"]["after"]
    # Again from its record, with another share.
    again = ["prune", "loraprune", folder, "--recipe", out / "jprune.json", "--ratio", "0.25"]
    status, printed, _ = run(*again, "--plan", "--json")
    assert status == 0
    parameters = json.loads(printed)["parameters"]  # a quarter of 2 heads is none; 14 of 56 channels go in 2 layers
    assert parameters["before"] - parameters["after"] == 2 * 14 * 3 * 32
    assert run(*words, "--plan", "--sparsity", "0.5")[0] == 1
    assert run(*words, *more)[0] == 2  # no --out
    assert run(*words, "--out", tmp_path / "no")[0] == 2  # no --data
    assert "say how much is to go" in run("prune", "loraprune", folder, "--plan")[2]
