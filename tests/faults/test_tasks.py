"""Tasks: the numbers are those of the harness' own backend for transformers on the same model, digit by digit."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
pytest.importorskip("torch")

import jprune
from jprune.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
    "generating": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{next}}"
generation_kwargs:
  until: ["w7"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
""",
    "shown": """
output_type: multiple_choice
fewshot_split: test
num_fewshot: 2
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
""",
}
CHAT = "{% for m in messages %}w5 {{ m['content'] }} w6 {% endfor %}{% if add_generation_prompt %}w7 {% endif %}"


@pytest.fixture
def folders(tiny_model, tmp_path):
    """A model, what is left of it after pruning, and tasks about it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = tiny_model(max_position_embeddings=64, eos_token_id=3)
    names = {f"w{i}" if i > 3 else f"<{i}>": i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<0>", "<3>"])
    tokenizer.save(str(model / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<3>",
        "unk_token": "<0>",
        "chat_template": CHAT,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    jprune.prune_model(model, tmp_path / "pruned", method=jprune.Magnitude(), pattern=jprune.Unstructured(0.5))
    rng = np.random.default_rng(0)

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(4, 96, count))

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    # Of many lengths, one of them longer than the context.
    rows = [
        {
            "question": words(n),
            "choices": [words(1), words(2), words(3)],
            "answer": int(rng.integers(3)),
            "next": words(2),
        }
        for n in (3, 5, 8, 13, 21, 34, 40, 130)
    ]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = (
            f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tasks / 'rows.jsonl'}\ntest_split: test\n"
        )
        (tasks / f"{name}.yaml").write_text(f"task: jprune_{name}\n{data}{text}")
    return model, tmp_path / "pruned", tasks


def test_the_harness_finds_the_same(folders, capsys):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    dense, pruned, tasks = folders
    every = [f"jprune_{name}" for name in TASKS]
    for model, names, chat in ((dense, every, False), (pruned, every, False), (pruned, every[:1] + every[2:], True)):
        words = ["eval", "tasks", str(model), "--tasks", ",".join(names), "--include", str(tasks), "--json"]
        assert main([*words, *["--chat"] * chat]) == 0
        ours = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]
        theirs = lm_eval.simple_evaluate(
            model=HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=2, max_length=64),
            tasks=names,
            task_manager=TaskManager(include_path=str(tasks)),
            apply_chat_template=chat,
            log_samples=False,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )["results"]
        assert ours.keys() == theirs.keys() == set(names)
        for name in names:
            found = {k: v for k, v in ours[name].items() if isinstance(v, float)}
            assert found, name
            for metric, value in found.items():
                if "_stderr" not in metric:
                    assert value == pytest.approx(theirs[name][metric], rel=1e-5), (name, metric)


def test_flips_are_those_of_the_harness(folders, capsys, tmp_path):
    """`compare --tasks`: items that each model has right, counted in what the harness' own backend answers."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    dense, pruned, tasks = folders
    jprune.prune_model(dense, tmp_path / "most", method=jprune.Magnitude(), pattern=jprune.Unstructured(0.95))
    models, names = (dense, pruned, tmp_path / "most"), ["jprune_choice", "jprune_generating", "jprune_rolling"]
    words = ["compare", *map(str, models), "--tasks", ",".join(names), "--include", str(tasks), "--windows", "1"]
    words += ["--text", str(tasks / "rows.txt"), "--sequence-length", "16", "--out", str(tmp_path / "page.html")]
    (tasks / "rows.txt").write_text(" ".join(f"w{i}" for i in range(4, 90)))
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert "jprune_rolling has no metric that says of each item whether it is right" in said.err
    found = json.loads(said.out.strip().splitlines()[-1])["tasks"]
    assert [(t["task"], t["metric"]) for t in found] == [
        ("jprune_choice", "acc"), ("jprune_choice", "acc_norm"), ("jprune_generating", "exact_match"),
    ]  # fmt: skip
    right = []
    for model in models:
        theirs = lm_eval.simple_evaluate(
            model=HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=2, max_length=64),
            tasks=names[:2],
            task_manager=TaskManager(include_path=str(tasks)),
        )["samples"]
        right.append(theirs)
    flipped = 0
    for task in found:
        answers = [
            np.array([s[task["metric"]] for s in sorted(own[task["task"]], key=lambda s: s["doc_id"])]) for own in right
        ]
        assert task["items"] == 8
        for own, theirs in zip(task["models"], answers, strict=True):
            assert own["accuracy"]["value"] == theirs.mean()
            assert own["lost"] == np.sum((answers[0] == 1) & (theirs == 0))
            assert own["gained"] == np.sum((answers[0] == 0) & (theirs == 1))
            assert own["change"]["value"] == pytest.approx(theirs.mean() - answers[0].mean())
            flipped += own["lost"] + own["gained"]
    assert flipped, "a test of flips without any"
    page = (tmp_path / "page.html").read_text()
    assert "What they answer" in page
    assert "not distinguishable" in page


def test_what_cannot_be_asked(folders, capsys):
    model, _, tasks = folders
    assert main(["eval", "tasks", str(model), "--tasks", "no_such_task"]) == 1
    assert "expected tasks of lm-evaluation-harness, got no_such_task" in capsys.readouterr().err
    assert main(["eval", "tasks", str(model), "--tasks", "jprune_choice", "--include", str(tasks / "none")]) == 1
    assert "--include is a folder with tasks" in capsys.readouterr().err
    (tasks / "rows.jsonl").unlink()
    words = ["eval", "tasks", str(model), "--tasks", "jprune_choice", "--include", str(tasks)]
    assert main(words) == 1
    error = capsys.readouterr().err.strip()
    assert "the data of jprune_choice cannot be had" in error
    assert len(error.splitlines()) == 1
    (model / "tokenizer.json").unlink()
    assert main(words) == 1
    assert "has no tokenizer" in capsys.readouterr().err
