"""Prunes, and does to the run what happens to runs: kills, full disks, flipped bits. For as long as it is told.

    python scripts/soak.py --minutes 60
    python scripts/soak.py --trials 20 --seed 3

A trial starts a run of a tiny model as a process, ends it at a random moment (kill -9, terminate, Ctrl-C, or the disk
is full), perhaps flips a bit in the run folder, and resumes until it is done. In the end the result must be, bit for
bit, what an undisturbed run writes, or the run must be refused in a line that names what is damaged, and, begun anew,
end in the same bits. Then a bit of the result is flipped: `jprune info --verify` must name the file. The model, and a
file of the user's beside the result, must be what they were.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from fuzz_inputs import LLAMA, as_json, safetensors, tensors

METHODS = {
    "magnitude": ["prune", "magnitude", "--sparsity", "0.5"],
    "wanda": ["prune", "wanda", "--sparsity", "0.5", "--calibration", "TOKENS"],
    "sparsegpt": ["prune", "sparsegpt", "--pattern", "2:4", "--calibration", "TOKENS"],
}
ENDS = {"kill -9": signal.SIGKILL, "terminate": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
SLOWLY = """
import os, sys, time, jprune.checkpoints.writing as writing
replace = writing.replace
def slow(*args):
    time.sleep(0.03)
    replace(*args)
writing.replace = slow
from jprune.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command, with time to be killed in between the marks that it makes."""


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


class Soak:
    """The place of the trials."""

    def __init__(self, here: Path, seed: int):
        self.here, self.rng = here, random.Random(seed)
        self.counts: collections.Counter = collections.Counter()
        self.wrong: list[str] = []
        model = here / "model"
        model.mkdir()
        (model / "config.json").write_bytes(as_json(LLAMA | {"num_hidden_layers": 2}))
        (model / "model.safetensors").write_bytes(safetensors(tensors()))
        np.save(here / "tokens.npy", np.random.default_rng(0).integers(0, 40, (4, 16), dtype=np.int32))
        self.model = digest(model)
        self.undisturbed: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        for name in METHODS:
            start = time.monotonic()
            done = self.command(name, here / f"plain-{name}").wait()
            if done != 0:
                raise SystemExit(f"an undisturbed run of {name} ends with {done}")
            self.seconds[name] = time.monotonic() - start
            self.undisturbed[name] = weights(here / f"plain-{name}")

    def command(self, name: str, out: Path, *more: str, log: Path | None = None, first: str = "") -> subprocess.Popen:
        """A run, as a process."""
        words = [str(self.here / "tokens.npy") if word == "TOKENS" else word for word in METHODS[name]]
        words = [*words[:2], str(self.here / "model"), *words[2:], "--out", str(out), *more]
        with open(log or os.devnull, "wb") as file:
            return subprocess.Popen([sys.executable, "-c", first + SLOWLY, *words], stdout=file, stderr=file)

    def trial(self, number: int) -> None:
        """One run and what happens to it."""
        name, ending = self.rng.choice(list(METHODS)), self.rng.choice([*ENDS, "full disk"])
        folder = self.here / f"trial-{number}"
        folder.mkdir()
        out, log, mine = folder / "out", folder / "log", folder / "mine.txt"
        mine.write_text("the user's own")
        what = f"{number}: {name}, {ending}"
        flips = self.rng.random() < 0.4
        for attempt in range(1 + self.rng.randrange(3)):
            self.disturbed(name, out, ending, more=["--resume"] * bool(attempt))
        flipped = self.flip(folder / "out.run") if flips and (folder / "out.run").exists() else None
        self.counts[f"{ending}"] += 1
        self.counts["bits flipped in run folders"] += flipped is not None
        status = self.command(name, out, "--resume", log=log).wait() if not out.exists() else 0
        if status != 0:
            said = log.read_text(errors="replace").strip()
            if flipped is None or "Traceback" in said or "\n" in said or flipped.name not in said:
                self.wrong.append(f"{what}: resuming ends with {status} (flipped: {flipped}): {said[-300:]}")
                return
            self.counts["refused, begun anew"] += 1
            shutil.rmtree(folder / "out.run")
            for left in folder.glob(".out.*"):
                shutil.rmtree(left)
            if self.command(name, out, log=log).wait() != 0:
                self.wrong.append(f"{what}: begun anew it fails: {log.read_text(errors='replace')[-300:]}")
                return
        if weights(out) != self.undisturbed[name]:
            self.wrong.append(f"{what}: the result differs (flipped: {flipped})")
        left = sorted(path.name for path in folder.iterdir())
        if left != ["log", "mine.txt", "out"] and left != ["mine.txt", "out"]:
            self.wrong.append(f"{what}: left behind {left}")
        if mine.read_text() != "the user's own" or digest(self.here / "model") != self.model:
            self.wrong.append(f"{what}: a file of the user's was changed")
        self.verified(out, what)
        shutil.rmtree(folder)

    def disturbed(self, name: str, out: Path, ending: str, more: list[str]) -> None:
        """A run that is ended at a random moment."""
        if out.exists():
            return
        if ending == "full disk":
            limit = self.rng.choice([1000, 3000, 6000])  # no file may grow beyond: what a full disk looks like
            self.command(name, out, *more, first=FULL.format(limit)).wait()
            return
        process = self.command(name, out, *more)
        time.sleep(self.seconds[name] * self.rng.uniform(0.4, 1.05))
        process.send_signal(ENDS[ending])
        process.wait()

    def flip(self, folder: Path) -> Path | None:
        """Flips a bit of a file below a folder; gives the file."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
        if not files:
            return None
        path = self.rng.choice(files)
        data = bytearray(path.read_bytes())
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(data)
        return path

    def verified(self, out: Path, what: str) -> None:
        """A bit of a result is flipped: it is found, and the file named."""
        from jprune.checkpoints import record
        from jprune.errors import JpruneError

        if record.damaged(out):
            self.wrong.append(f"{what}: {record.damaged(out)}")
        flipped = self.flip(out)
        self.counts["bits flipped in results"] += 1
        try:
            found = record.damaged(out)
        except JpruneError as error:
            found = [str(error)]
        if not any(str(flipped.relative_to(out)) in each for each in found):
            self.wrong.append(f"{what}: a bit of {flipped} was flipped, and verify says {found}")


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder: Path) -> dict[str, str]:
    """All but the record, which says how long the run took."""
    return {name: each for name, each in digest(folder).items() if name != "jprune.json"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--trials", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as here:
        os.environ["XDG_CACHE_HOME"] = str(Path(here) / "cache")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(here) / "cache" / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        soak = Soak(Path(here), options.seed)
        number = 0
        while number < options.trials and time.monotonic() - start < 60 * options.minutes:
            known = len(soak.wrong)
            soak.trial(number)
            for line in soak.wrong[known:]:
                print(line, flush=True)
            number += 1
    minutes = round((time.monotonic() - start) / 60, 1)
    print(json.dumps({"trials": number, "wrong": len(soak.wrong), "minutes": minutes, **soak.counts}))
    return bool(soak.wrong)


if __name__ == "__main__":
    sys.exit(main())
