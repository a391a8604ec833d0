"""Task scores of jprune and of lm-evaluation-harness' own backend for transformers, on the same models and items.

    python scripts/check_tasks.py [--models demo pruned] [--items 16] [--out tasks.json]     # needs 'jprune[eval]'

Four kinds of tasks, whose items are made of the help texts of Python (`pydoc_data.topics`), so that no network is
needed: the words that go on from a text, among those of others (multiple choice), the same after two examples, the
perplexity of a text (rolling), and its continuation (generation). The models are converted to folders that transformers
reads; "pruned" is the first one with half of its weights removed by SparseGPT.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from machine import describe

CHOICE = """output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TASKS = {
    "choice": CHOICE,
    "examples": CHOICE + "fewshot_split: test\nnum_fewshot: 2\n",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{whole}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "generation": """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{next}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 16
metric_list:
  - metric: bleu
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "pruned"])
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": describe(), "options": {"models": args.models, "items": args.items}}
    result["rows"] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(folder, args.items)
        for name in args.models:
            model = folder / "as-transformers-reads-it" / name
            make(name, args.models[0], model)
            ours, theirs = by_jprune(model, folder), by_transformers(model, folder)
            for task in sorted(ours):
                for metric in sorted(ours[task].keys() & theirs[task].keys()):
                    row = {"model": name, "task": task, "metric": metric.removesuffix(",none")}
                    row |= {"jprune": ours[task][metric], "transformers": theirs[task][metric]}
                    row["difference"] = abs(row["jprune"] - row["transformers"])
                    result["rows"].append(row)
                    print(
                        "| {model} | {task} | {metric} | {jprune:.6f} | {transformers:.6f} |".format(**row), flush=True
                    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def write_tasks(folder: Path, items: int) -> None:
    """Items, and tasks as the harness takes them."""
    draw = random.Random(0)
    texts = [words for text in topics.values() if len(words := text.split()) > 80]
    chosen = draw.sample(texts, items)
    endings = [" ".join(words[40:48]) for words in chosen]
    rows = []
    for words, own in zip(chosen, endings, strict=True):
        choices = [*draw.sample([other for other in endings if other != own], 3), own]
        draw.shuffle(choices)
        row = {"text": " ".join(words[:40]), "next": own, "choices": choices, "answer": choices.index(own)}
        rows.append(row | {"whole": " ".join(words[:80])})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: pydoc_{name}\n{data}{text}", encoding="utf-8")


def make(name: str, first: str, out: Path) -> None:
    """The model in a folder of its own, as Hugging Face writes it."""
    words = ["convert", name, "--format", "hf"]
    if name == "pruned":
        words = ["prune", "sparsegpt", first, "--sparsity", "0.5", "--calibration", "pydoc", "--samples", "16"]
        words += ["--sequence-length", "512"]
    out.parent.mkdir(exist_ok=True)
    jprune(*words, "--out", str(out))


def jprune(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "jprune", *words, "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def by_jprune(model: Path, tasks: Path) -> dict[str, dict[str, float]]:
    names = ",".join(f"pydoc_{name}" for name in TASKS)
    return numbers(jprune("eval", "tasks", str(model), "--tasks", names, "--include", str(tasks))["results"])


def by_transformers(model: Path, tasks: Path) -> dict[str, dict[str, float]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return numbers(
        lm_eval.simple_evaluate(
            model=HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4),
            tasks=[f"pydoc_{name}" for name in TASKS],
            task_manager=TaskManager(include_path=str(tasks)),
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )["results"]
    )


def numbers(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The metrics of every task, without standard errors."""
    return {
        task: {k: v for k, v in found.items() if isinstance(v, float) and "stderr" not in k}
        for task, found in results.items()
    }


if __name__ == "__main__":
    main()
