"""Times this tree's commands against those of another commit, phase by phase, in one run on one machine.

    python scripts/bench_before.py COMMIT [--model demo] [--jobs sparsegpt lora] [--rounds 2] [--out before.json]

Commands of both trees run in turn, each as a process of its own, as a user starts them; the first of each, which
compiles, does not count, and of --rounds others the best does. Every tree keeps a compile cache of its own.

sparsegpt   the whole job at 50 %, and its phases as its record has them; -long with the same tokens in windows of 2048
magnitude   the same
perplexity  seconds a window of 2048 tokens, from the tokens to the loss: a run over 5 windows without one over 1
lora, full  seconds a step of two windows of 512 tokens; -long of one of 2048
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import describe

Seconds = dict[str, float]
JOBS = ["sparsegpt", "sparsegpt-long", "magnitude", "perplexity", "lora", "lora-long", "full", "full-long"]
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--jobs", nargs="+", default=JOBS, choices=JOBS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name != "out"}
    with tempfile.TemporaryDirectory() as scratch, checked_out(args.commit) as before:
        trees = {"before": before, "now": ROOT}
        runs: dict[str, dict[str, list[float]]] = {name: {} for name in trees}
        for job in (jobs(args.model, args.samples)[name] for name in args.jobs):
            for number in range(args.rounds + 1):
                for name, tree in trees.items():
                    for phase, seconds in job(Command(tree, Path(scratch) / name)).items():
                        if number:
                            runs[name].setdefault(phase, []).append(seconds)
                        print(f"{name:6} {phase:28} {seconds:8.2f} s{'' if number else ' (compiles)'}", flush=True)
            if args.out:
                args.out.write_text(json.dumps({"machine": describe(), "options": options, **summary(runs)}, indent=2))
    found = summary(runs)
    for phase, ratio in found["faster"].items():
        before, now = (found["seconds"][name][phase] for name in trees)
        print(f"{phase:28} {before:8.2f} s -> {now:8.2f} s, {ratio:.2f}x")


def summary(runs: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The best seconds of every phase in both trees, how many times faster this one is, and all runs."""
    best = {name: {phase: min(took) for phase, took in phases.items()} for name, phases in runs.items()}
    faster = {phase: best["before"][phase] / took for phase, took in best["now"].items() if took}
    return {"seconds": best, "faster": faster, "runs": runs}


class Command:
    """Runs the commands of one tree, with a folder for what they write."""

    def __init__(self, tree: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.out = folder / "out"
        self._env = os.environ | {
            "PYTHONPATH": str(tree),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        }

    def __call__(self, *words: str | Path) -> tuple[float, dict[str, Any]]:
        """Seconds of the whole process, and the JSON that it prints."""
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "jprune", *map(str, words), "--json"],
            env=self._env, cwd=self.out.parents[1], check=True, capture_output=True, text=True,
        )  # fmt: skip
        return time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])


def jobs(model: str, samples: int) -> dict[str, Callable[[Command], Seconds]]:
    def prune(name: str, method: str, *words: str) -> Callable[[Command], Seconds]:
        def run(command: Command) -> Seconds:
            out = ("--sparsity", "0.5", "--out", command.out, "--overwrite")
            took, found = command("prune", method, model, *out, *words)
            phases = {f"{name}: {phase}": seconds for phase, seconds in found["seconds"].items() if phase != "total"}
            return {f"{name}: whole": took} | phases

        return run

    def calibration(length: int) -> tuple[str, ...]:
        count = str(samples * 512 // length)
        return ("--calibration", "pydoc", "--samples", count, "--sequence-length", str(length))

    def perplexity(command: Command) -> Seconds:
        def seconds(windows: int) -> float:
            words = ("--text", "pydoc", "--sequence-length", "2048", "--windows", str(windows))
            return command("eval", "perplexity", model, *words)[0]

        return {"perplexity: window of 2048": (seconds(5) - seconds(1)) / 4}

    def tune(method: str, windows: int, length: int) -> Callable[[Command], Seconds]:
        def run(command: Command) -> Seconds:
            words = (
                "--data", "pydoc", "--steps", "4", "--batch-size", str(windows), "--micro-batch", str(windows),
                "--sequence-length", str(length), "--out", command.out, "--overwrite",
            )  # fmt: skip
            found = command("tune", method, model, *words)[1]
            return {f"{method}: step of {windows} x {length}": windows * length / found["tokens_per_second"]}

        return run

    return {
        "sparsegpt": prune("sparsegpt", "sparsegpt", *calibration(512)),
        "sparsegpt-long": prune("sparsegpt-long", "sparsegpt", *calibration(2048)),
        "magnitude": prune("magnitude", "magnitude"),
        "perplexity": perplexity,
        "lora": tune("lora", 2, 512),
        "lora-long": tune("lora", 1, 2048),
        "full": tune("full", 2, 512),
        "full-long": tune("full", 1, 2048),
    }


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The files of a commit, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


if __name__ == "__main__":
    main()
