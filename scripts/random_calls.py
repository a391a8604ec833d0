"""Types random `jprune` commands, valid and not, over small models: no traceback, the right exit status, results whole.

    python scripts/random_calls.py --calls 1000 --seed 0

A call has what its command needs, or lacks some of it; and some flags of its help, with values that fit, or do not.
Wrong is: an exception; an exit status other than 0, 1 or 2; a failure that does not say why in one line of stderr;
`--out` that is there after a failure, or is not whole after a success; anything left behind; a model that was changed.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from fuzz_inputs import LLAMA, as_json, safetensors, tensors, tokenizer
from soak import digest

NEEDS = {
    "prune magnitude": ["--sparsity", "0.5"],
    "prune wanda": ["--pattern", "2:4", "--calibration", "TOKENS"],
    "prune sparsegpt": ["--sparsity", "0.5", "--calibration", "TOKENS"],
    "prune llm-pruner": ["--ratio", "0.5", "--calibration", "TOKENS"],
    "prune drop-layers": ["--layers", "1", "--calibration", "TOKENS"],
    "prune loraprune": ["--sparsity", "0.5", "--data", "TOKENS", "--steps", "1", "--batch-size", "2"],
    "prune shearing": ["--target", "layers=1", "--data", "TOKENS", "--steps", "2", "--batch-size", "2"],
    "prune prune-and-tune": ["--sparsity", "0.5", "--data", "TOKENS", "--steps", "1", "--batch-size", "2"],
    "tune lora": ["--data", "TOKENS", "--steps", "1", "--batch-size", "2"],
    "tune full": ["--data", "TOKENS", "--steps", "1", "--batch-size", "2"],
    "convert": [],
    "info": [],
    "groups": [],
    "eval perplexity": ["--text", "TOKENS"],
    "generate": ["--prompt", "w1 w2", "--max-tokens", "2"],
}
WITHOUT_RESULT = ("info", "groups", "eval perplexity", "generate")
FIT = {
    "--sparsity": ["0", "0.3", "0.99"], "--pattern": ["2:4", "1:2", "4:8"], "--per": ["kernel", "output"],
    "--dtype": ["float32", "bfloat16"], "--format": ["hf", "jprune", "orbax", "decilm"], "--where": ["mlp", "attn/q"],
    "--skip": ["blocks/0/", "attn"], "--samples": ["2"], "--sequence-length": ["8"], "--seed": ["7"],
    "--override": ["mlp/down=0.3", "attn=1:2"], "--ratio": ["0.1", "0.6"], "--rank": ["1"], "--windows": ["1"],
    "--length": ["8"], "--memory": ["8GB"], "--targets": ["q,v", "down"], "--learning-rate": ["1e-3"],
    "--layers": ["1"], "--evaluate": ["TOKENS"], "--text": ["TOKENS", "TEXT"], "--data": ["TOKENS", "TEXT"],
    "--calibration": ["TOKENS", "TEXT"], "--run": ["RUN"], "--recipe": ["RECIPE"], "--micro-batch": ["1"],
}  # fmt: skip
JUNK = [
    "", "x", "-1", "0", "1", "2", "nan", "inf", "1e9", "0.5", "2:4", "4:2", "0:0", "float13", "MISSING", "MODEL", "a=b",
    "\udcff", "é", "[", "(", "layers=0", "hidden=3,heads=1", "99999999999999999999", "0.1,0.2", "TOKENS", "TEXT",
    "{here}",
]  # fmt: skip


class Calls:
    """The place, and what was wrong."""

    def __init__(self, here: Path, seed: int):
        self.here, self.rng = here, random.Random(seed)
        self.wrong: list[str] = []
        self.counts: collections.Counter = collections.Counter()
        shapes = {"plain": {}, "tied": {"tie_word_embeddings": True}, "half": {"torch_dtype": "bfloat16"}}
        for name, own in shapes.items():
            folder = here / name
            folder.mkdir()
            (folder / "config.json").write_bytes(as_json(LLAMA | own))
            arrays = {key: x for key, x in tensors().items() if name != "tied" or key != "lm_head.weight"}
            (folder / "model.safetensors").write_bytes(safetensors(arrays))
            if name != "half":
                (folder / "tokenizer.json").write_bytes(as_json(tokenizer()))
        self.models = [here / name for name in shapes]
        self.before = {model: digest(model) for model in self.models}
        np.save(here / "tokens.npy", np.random.default_rng(0).integers(0, 40, (6, 16), dtype=np.int32))
        (here / "text.txt").write_text("w1 w2 w3 w4 w5\n" * 100)
        (here / "recipe.toml").write_text('sparsity = 0.25\nskip = ["attn"]\n')
        self.flags = {name: self._flags(name) for name in NEEDS}

    def _flags(self, name: str) -> list[str]:
        _, out, _ = self.typed([*name.split(), "--help"])
        return sorted(set(re.findall(r"(--[a-z][a-z-]+)", out)) - {"--help", "--out", "--device-mesh"})

    def typed(self, words: list[str]) -> tuple[object, str, str]:
        """Exit status (or the traceback), stdout and stderr."""
        from jprune.cli import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status: object = main(words)
            except SystemExit as end:
                status = end.code
            except BaseException:
                status = traceback.format_exc()
        return status, out.getvalue(), err.getvalue()

    def words(self, name: str) -> list[str]:
        """What is typed, but for the model."""
        rng, needs = self.rng, NEEDS[name]
        pairs = [needs[i : i + 2] for i in range(0, len(needs), 2)]
        if rng.random() < 0.15 and pairs:
            pairs.remove(rng.choice(pairs))
        for flag in rng.sample(self.flags[name], k=min(rng.choice([0, 0, 1, 1, 2, 3]), len(self.flags[name]))):
            fits = FIT.get(flag)
            value = None if rng.random() < 0.5 else rng.choice(JUNK)
            if fits and rng.random() < 0.8:
                value = rng.choice(fits)
            pairs = [pair for pair in pairs if pair[0] != flag]
            pairs.append([flag] if value is None else [flag, value])
        if rng.random() < 0.05:
            pairs.append([rng.choice(["--sparsty", "--no-such", "-x", "stray"])])
        rng.shuffle(pairs)
        return [word for pair in pairs for word in pair]

    def call(self, number: int) -> None:
        """One command."""
        folder = self.here / f"call-{number}"
        folder.mkdir()
        name = self.rng.choice(list(NEEDS))
        model = self.rng.choice([*self.models, *self.models, *self.models, self.here / "missing", self.here])
        names = {
            "TOKENS": self.here / "tokens.npy", "TEXT": self.here / "text.txt", "RUN": folder / "run",
            "RECIPE": self.here / "recipe.toml", "MISSING": folder / "missing", "MODEL": model, "{here}": self.here,
        }  # fmt: skip
        words = [*name.split(), str(model), *(str(names.get(word, word)) for word in self.words(name))]
        out = folder / "out"
        if name not in WITHOUT_RESULT and self.rng.random() < 0.95:
            words += ["--out", str(out)]
        status, printed, err = self.typed(words)
        for wrong in self.faults(status, printed, err, words, out):
            self.wrong.append(f"jprune {' '.join(words)}\n  {wrong}".encode(errors="backslashreplace").decode())
        self.counts[f"status {status}"] += 1
        shutil.rmtree(folder, ignore_errors=True)

    def faults(self, status: object, printed: str, err: str, words: list[str], out: Path) -> list[str]:
        """What is wrong with what a call did."""
        found = []
        if status not in (0, 1, 2):
            return [str(status)]
        if status == 1 and not re.fullmatch(r"(.+\n)*jprune: .+\n", err):
            found.append(f"status 1 and stderr {err[-300:]!r}")
        if status == 2 and not err:
            found.append("status 2 and nothing on stderr")
        planned = "--plan" in words or "--help" in words
        if out.exists() and (status != 0 or planned):
            found.append(f"status {status} and `out` is there")
        if status == 0 and "--out" in words and not planned:
            from jprune.checkpoints import record

            if not out.exists() or record.damaged(out):
                found.append("status 0 and `out` is not whole")
        left = {path.name for path in out.parent.iterdir()} - {"out", "out.run", "run"}
        if left:
            found.append(f"left behind: {sorted(left)}")
        if any(digest(model) != before for model, before in self.before.items()):
            found.append("a model was changed")
        if "--json" in words and status == 0 and not planned:
            try:
                json.loads(printed.strip().splitlines()[-1])
            except (ValueError, IndexError):
                found.append("--json printed something else")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="calls-") as here:
        os.environ |= {"XDG_CACHE_HOME": str(Path(here) / "cache"), "HF_HUB_OFFLINE": "1"}
        calls = Calls(Path(here), options.seed)
        for number in range(options.calls):
            known = len(calls.wrong)
            calls.call(number)
            for line in calls.wrong[known:]:
                print(line, flush=True)
    minutes = round((time.monotonic() - start) / 60, 1)
    print(json.dumps({"calls": options.calls, "wrong": len(calls.wrong), "minutes": minutes, **calls.counts}))
    return bool(calls.wrong)


if __name__ == "__main__":
    sys.exit(main())
