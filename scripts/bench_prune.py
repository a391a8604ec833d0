"""Times the whole job on the demo model: a first run, a run with a warm compile cache, and plain PyTorch.

    python scripts/bench_prune.py [--method sparsegpt] [--samples 64] [--sequence-length 512] [--baseline] [--out f.json]

Each jprune run is a process of its own, as a user starts it. With --baseline, the same calibration windows go through
`torch_sparsegpt.prune_model` (SparseGPT in plain PyTorch over the Hugging Face model), and both results' perplexities
are measured by jprune's evaluation on the same windows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe


def jprune(*words: str, cache: Path | None = None) -> dict:
    """Runs the command and returns its JSON, with the seconds of the whole process."""
    env = dict(os.environ)
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jprune", *words, "--json"], env=env, check=True, stdout=subprocess.PIPE
    )
    seconds = time.perf_counter() - start
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": round(seconds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sparsegpt", choices=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--baseline", action="store_true", help="also time SparseGPT in plain PyTorch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict = {"machine": describe(), "method": args.method, "sparsity": args.sparsity, "runs": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, args)
        common = ["--sparsity", str(args.sparsity), "--calibration", str(folder / "calibration.npy")]
        for run in ("first", "warm"):
            words = ["prune", args.method, "demo", "--out", str(folder / run), *common]
            result["runs"][run] = jprune(*words, cache=folder / "cache")
            print(run, json.dumps(result["runs"][run]["seconds"]), flush=True)
        result["perplexity"] = {"dense": perplexity("demo", folder), "jprune": perplexity(str(folder / "warm"), folder)}
        if args.baseline:
            result["runs"]["torch"] = baseline(folder, args)
            result["perplexity"]["torch"] = perplexity(str(folder / "torch"), folder)
            warm = result["runs"]["warm"]["process_seconds"]
            result["speedup"] = result["runs"]["torch"]["process_seconds"] / warm
    print(json.dumps({k: result[k] for k in ("perplexity", "speedup") if k in result}))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """The same token windows for everybody, and the demo model as a Hugging Face folder."""
    import jprune as library
    from jprune import data

    checkpoint = library.load("demo")
    windows = data.calibration("pydoc", checkpoint.tokenizer, samples=args.samples, length=args.sequence_length)
    np.save(folder / "calibration.npy", windows.tokens)
    windows = data.evaluation("pydoc", checkpoint.tokenizer, length=args.sequence_length)
    np.save(folder / "evaluation.npy", windows.tokens)
    if args.baseline:
        jprune("convert", "demo", "--out", str(folder / "dense"))


def perplexity(model: str, folder: Path) -> float:
    return jprune("eval", "perplexity", model, "--text", str(folder / "evaluation.npy"))["perplexity"]


def baseline(folder: Path, args: argparse.Namespace) -> dict:
    """SparseGPT in PyTorch, in a process of its own."""
    program = (
        "import json, sys, time; start = time.perf_counter(); import numpy, torch_sparsegpt as t\n"
        f"tokens = numpy.load({str(folder / 'calibration.npy')!r})\n"
        f"model, seconds = t.prune_model({str(folder / 'dense')!r}, tokens, {args.sparsity})\n"
        f"model.save_pretrained({str(folder / 'torch')!r})\n"
        "print(json.dumps({'seconds': seconds}))"
    )
    start = time.perf_counter()
    scripts = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", program], cwd=scripts, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    result = {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": round(seconds, 3)}
    print("torch", json.dumps(result["seconds"]), flush=True)
    return result


if __name__ == "__main__":
    main()
