"""Times the whole job on the demo model: a first run, a run with a warm compile cache, and plain PyTorch.

    python scripts/bench_prune.py [--methods sparsegpt fast balanced] [--baseline] [--out results.json]
    python scripts/bench_prune.py --roofline [--out roofline.json]  # phase by phase; a picture beside the JSON

Each jprune run is a process of its own, as a user starts it. "forward" is one pass of the calibration windows through
the dense blocks, without statistics: what a method that observes inputs cannot do without. With --baseline, the same
calibration windows go through `torch_sparsegpt.prune_model` (SparseGPT in plain PyTorch over the Hugging Face model).
Perplexities are all measured by jprune, on the same windows.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import roofline
from machine import describe

METHODS = {
    "sparsegpt": ["sparsegpt"],
    "wanda": ["wanda"],
    "magnitude": ["magnitude"],
    "fast": ["auto", "--quality", "fast"],
    "balanced": ["auto", "--quality", "balanced"],
}
"""Words of `jprune prune` by the name of the row."""


def jprune(*words: str, cache: Path | None = None) -> dict:
    """Runs the command and returns its JSON, with the seconds of the whole process, and of processor."""
    env = dict(os.environ)
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    start, before = time.perf_counter(), spent()
    done = subprocess.run(
        [sys.executable, "-m", "jprune", *words, "--json"], env=env, check=True, stdout=subprocess.PIPE
    )
    seconds = time.perf_counter() - start
    own = {"process_seconds": round(seconds, 3), "processor_seconds": round(spent() - before, 1)}
    return json.loads(done.stdout.splitlines()[-1]) | own


def spent() -> float:
    """Seconds of processor of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda", "magnitude"], choices=METHODS)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--baseline", action="store_true", help="also time SparseGPT in plain PyTorch")
    parser.add_argument("--roofline", action="store_true", help="phases of SparseGPT against the machine's limits")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict = {"machine": describe(), "options": {k: v for k, v in vars(args).items() if k != "out"}, "runs": {}}
    if args.roofline:
        result |= roofline.measure(args.samples, args.sequence_length)
        roofline.show(result)
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")
            roofline.draw(result, args.out.with_suffix(".svg"))
        return
    runs = result["runs"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, args)
        common = ["--sparsity", str(args.sparsity), "--calibration", str(folder / "calibration.npy")]
        result["perplexity"] = {"dense": perplexity("demo", folder)}
        runs["forward"] = {"seconds": {"total": forward_seconds(folder)}}
        show("forward", runs["forward"])
        for method in args.methods:
            for run in ("first", "warm"):
                name, *own = METHODS[method]
                words = ["prune", name, "demo", *own, "--out", str(folder / method), "--overwrite", *common]
                runs[f"{method} {run}"] = jprune(*words, cache=folder / f"cache-{method}")
                show(f"{method} {run}", runs[f"{method} {run}"])
            result["perplexity"][method] = perplexity(str(folder / method), folder)
        if args.baseline:
            runs["torch sparsegpt"] = baseline(folder, args)
            show("torch sparsegpt", runs["torch sparsegpt"])
            result["perplexity"]["torch sparsegpt"] = perplexity(str(folder / "torch"), folder)
            warm = runs["sparsegpt warm"]["process_seconds"]
            result["speedup"] = round(runs["torch sparsegpt"]["process_seconds"] / warm, 2)
    print(json.dumps({k: result[k] for k in ("perplexity", "speedup") if k in result}))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def show(name: str, run: dict) -> None:
    print(f"{name:18} {run.get('process_seconds', '')} {json.dumps(run['seconds'])}", flush=True)


def forward_seconds(folder: Path) -> float:
    """One pass of the calibration windows through the blocks; compiled before, the best of two."""
    import jax
    import jax.numpy as jnp

    import jprune as library
    from jprune.models import decoder
    from jprune.models.batching import windows_at_once

    checkpoint = library.load("demo")
    config, params = checkpoint.config, jax.tree.map(jnp.asarray, checkpoint.params())
    tokens = np.load(folder / "calibration.npy")
    size = windows_at_once(tokens.shape[1])
    batches = [jnp.asarray(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    embed, block = jax.jit(decoder.embed(config)), jax.jit(decoder.block(config, 0))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for batch in batches:
            x = embed(params, batch)
            for i in range(config.layers):
                x = block(params["blocks"][str(i)], x)
            jax.block_until_ready(x)
        seconds.append(time.perf_counter() - start)
    return round(min(seconds), 3)


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
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": round(seconds, 3)}


if __name__ == "__main__":
    main()
