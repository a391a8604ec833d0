"""What a run is calibrated on: several sources by weight, conversations, and what of it is measured on too."""

import importlib
import json

import numpy as np
from fake_method import EveryOther

import jprune
from jprune.checkpoints import record

parse = importlib.import_module("jprune.cli.main").parse


def test_words():
    words = ["model", "--sparsity", "0.5", "--out", "x"]
    mixed = ["--calibration", "web=hf:c4, my-code=dir/a=b,c.txt", "--calibration-proportions", "web=3,my-code=1"]
    recipe = parse("prune wanda", [*words, *mixed]).asked()
    assert recipe.calibration == {"web": "hf:c4", "my-code": "dir/a=b,c.txt"}
    assert recipe.calibration_proportions == {"web": 3, "my-code": 1}
    assert parse("prune wanda", [*words, "--calibration", "./a=b.txt"]).asked().calibration == "./a=b.txt"


def test_of_several_sources(tiny_model, token_file, tmp_path):
    """The record says what of what, and that the model is measured on what it was calibrated on."""
    files = {"a": token_file(9, 40, seed=1), "b": token_file(9, 40, seed=2)}
    a, b = (np.load(file) for file in files.values())
    held_out = np.concatenate([a[:1], np.load(token_file(3, 40, seed=3))])
    run = {"method": EveryOther(), "pattern": jprune.Unstructured(0.5), "samples": 8}
    weights = {"a": 3, "b": 1}
    out = tmp_path / "mixed"
    report = jprune.prune_model(
        tiny_model(), out, calibration=files, calibration_proportions=weights, evaluate=held_out, **run
    )
    made = record.read(out)
    assert {name: part["windows"] for name, part in made["calibration"]["parts"].items()} == {"a": 6, "b": 2}
    assert made["recipe"]["calibration"] == f"a={files['a']},b={files['b']}"
    assert made["evaluation"]["overlap"] == 0.25
    assert "25 % of the evaluation windows share text with the calibration windows" in " ".join(report.notices)
    by_hand = np.insert(a[:6], [2, 5], b[:2], axis=0)
    same = jprune.prune_model(tmp_path / "model", tmp_path / "same", calibration=by_hand, **run)
    assert [k.zeros for k in same.kernels] == [k.zeros for k in report.kernels]
    assert record.read(tmp_path / "same")["calibration"]["sha256"] == made["calibration"]["sha256"]
    # The recipe of the record, given again, is the same.
    words = ["model", "--out", "x", "--sparsity", "0.5", "--calibration", made["recipe"]["calibration"]]
    assert parse("prune wanda", words).asked().calibration == files


def test_of_conversations(tiny_model, tmp_path, monkeypatch):
    """Messages, of a file or of the hub, go through the model's own template, and are measured on through it too."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = tiny_model()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    template = "{% for m in messages %}w5 {{ m['content'] }} w6 {% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    talk = [
        [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1}"}] for i in range(10, 90)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))
    run = {"method": EveryOther(), "pattern": jprune.Unstructured(0.5), "samples": 5, "sequence_length": 24}
    chat = str(tmp_path / "chat.jsonl")
    jprune.prune_model(model, tmp_path / "out", calibration=chat, evaluate=chat, evaluate_windows=4, **run)
    made = record.read(tmp_path / "out")
    assert (made["calibration"]["windows"], made["calibration"]["seed"]) == (5, 0)
    rows = np.array([[5, i, 6, 5, i + 1, 6] for i in range(10, 26)], np.int32).reshape(4, 24)
    jprune.prune_model(model, tmp_path / "rows", calibration=chat, evaluate=rows, **run)
    assert record.read(tmp_path / "rows")["perplexity"] == made["perplexity"]

    class Rows(list):
        column_names = ("messages",)

    rows = Rows({"messages": messages} for messages in talk)
    monkeypatch.setattr("jprune.data.sources.hugging_face_dataset", lambda spec, split: (spec, rows))
    jprune.prune_model(model, tmp_path / "hub", calibration="hf:someone/talk", **run)
    assert record.read(tmp_path / "hub")["calibration"]["sha256"] == made["calibration"]["sha256"]

    # Instructions with an answer go into Alpaca's prompt, whatever the template; its words are unknown here, and so 0.
    asked = [{"instruction": f"w{i}", "output": f"w{i + 1}"} for i in range(10, 90)]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    alpaca = str(tmp_path / "alpaca.jsonl")
    jprune.prune_model(model, tmp_path / "alpaca", calibration=alpaca, evaluate=alpaca, evaluate_windows=4, **run)
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
        "### Instruction: w{} ### Response: w{}"
    )
    words = " ".join(f"{prompt.format(i, i + 1)} w2" for i in range(10, 26)).split()  # 2 is the model's end of text
    ids = [int(word[1:]) if word[0] == "w" and word[1:].isdigit() else 0 for word in words]
    jprune.prune_model(
        model, tmp_path / "ids", calibration=alpaca, evaluate=np.array(ids[:96], np.int32).reshape(4, 24), **run
    )
    assert record.read(tmp_path / "ids")["perplexity"] == record.read(tmp_path / "alpaca")["perplexity"]
