"""Times our own text generation with several checkpoints against a baseline: how much faster a smaller model is.

    python scripts/bench_generate.py MODEL [MODEL ...] --baseline DIR [--tokens 64] [--json]
    python scripts/bench_generate.py pruned packed packed-int8 packed:unpack --baseline dense --batch 1 8 32

Of every batch, each model has a process of its own, which loads it, generates once to compile, and then waits; the
processes take turns, one generation each, so that whatever slows the machine down slows all of them. Times are medians
over the repeats. The prompts are random tokens, the same for all models; every run yields exactly --tokens tokens of
each, greedily. Packed models run packed, and unpacked once where ":unpack" follows their name; on a GPU by the kernels
of --backend.

prefill   seconds until the first tokens of the answers are there (the prompts go through the model at once)
decode    seconds per step after it (a token of every answer at a time, with the key/value cache)
memory    the most host memory the process had, reading the file included, and what it had before it read the model;
          and the most on the accelerator
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

UNPACK = ":unpack"


def worker(source: str, options: dict[str, Any], pipe: Connection) -> None:
    """Generates whenever it is asked to; says what the model is at the beginning and its peak memory at the end."""
    import jax
    import jax.numpy as jnp

    import jprune
    from jprune.checkpoints.dtypes import activation_dtype
    from jprune.models.config import describe as sizes
    from jprune.models.generate import stream_batch
    from jprune.models.kernels import Kernel
    from jprune.runs.stopwatch import peak_device_memory_bytes, peak_memory_bytes
    from jprune.sparse import on_backend

    path, unpack, _ = source.partition(UNPACK)
    checkpoint = jprune.load(path)
    dtype = jnp.dtype(activation_dtype(checkpoint, options["dtype"]))
    jax.block_until_ready(jnp.zeros(8) + 1)  # what JAX itself takes
    before = peak_memory_bytes()

    def on_device(leaf: Any) -> Any:
        """What a model is computed with: dense arrays in one dtype, packed ones as they are."""
        return jax.tree.map(jnp.asarray, leaf) if isinstance(leaf, Kernel) else jnp.asarray(leaf, dtype)

    params = on_backend(checkpoint.params(packed=not unpack), options["backend"])
    params = jax.tree.map(on_device, params, is_leaf=lambda leaf: isinstance(leaf, Kernel))
    rng = np.random.default_rng(0)
    shape = (options["batch"], options["prompt_length"])
    prompts = rng.integers(0, min(checkpoint.config.vocab, options["vocab"]), shape, np.int32)

    def generate() -> dict[str, float]:
        start = time.perf_counter()
        steps = stream_batch(checkpoint.config, params, prompts, max_tokens=options["tokens"])
        at = [time.perf_counter() for _ in steps]
        return {"prefill": at[0] - start, "decode": (at[-1] - at[0]) / (len(at) - 1)}

    generate()
    count = checkpoint.parameters
    pipe.send(
        {
            "parameters": count,
            "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
            "dtype": dtype.name,
            "file_bytes": file_bytes(path),
            "memory_before_bytes": before,
            "sizes": sizes(checkpoint.config),
        }
    )
    while pipe.recv() == "go":
        pipe.send(generate())
    pipe.send({"peak_memory_bytes": peak_memory_bytes(), "peak_device_memory_bytes": peak_device_memory_bytes()})


def file_bytes(source: str) -> int | None:
    """The size of the weight files; None where the source is not a path."""
    path = Path(source)
    if path.is_file():
        return path.stat().st_size
    found = [f for end in ("safetensors", "gguf") for f in path.glob(f"*.{end}")]
    found += [f for f in (path / "params").rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in found) if found else None


def vocabulary(source: str) -> int:
    import jprune

    return jprune.load(source.partition(UNPACK)[0]).config.vocab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="what jprune.load takes")
    parser.add_argument("--baseline", required=True, help="what they are compared with")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts at a time; of several, one by one")
    parser.add_argument("--tokens", type=int, default=64, help="to generate, at least 2")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", help="of weights and activations; by default float32 on CPU, else what they have")
    parser.add_argument("--backend", choices=["pallas", "triton"], default="pallas", help="of packed kernels, on a GPU")
    parser.add_argument("--json", action="store_true", help="make the last line of stdout one JSON object")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    args = parser.parse_args()
    if args.tokens < 2 or args.repeats < 1 or min(args.batch) < 1:
        parser.error("expected --tokens of at least 2, and --repeats and --batch of at least 1")
    sources = [args.baseline, *(model for model in args.models if model != args.baseline)]
    options = {
        "prompt_length": args.prompt_length,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "backend": args.backend,
        "vocab": min(vocabulary(source) for source in sources),
    }
    # A GPU is shared by all processes: none may take it whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    result: dict[str, Any] = {
        "machine": describe(),
        "options": {k: v for k, v in options.items() if k != "vocab"} | {"repeats": args.repeats},
        "baseline": args.baseline,
        "batches": {},
    }
    for batch in args.batch:
        models = measure(sources, options | {"batch": batch}, args.repeats)
        baseline = models[args.baseline]
        for row in models.values():
            row["speedup"] = {part: baseline["seconds"][part] / row["seconds"][part] for part in ("prefill", "decode")}
            row["smaller"] = baseline["parameters"] / row["parameters"]
            row["tokens_per_second"] = batch / row["seconds"]["decode"]
        result["batches"][str(batch)] = models
        print(f"batch {batch}")
        show(models)
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.json:
        print(json.dumps(result))


def measure(sources: list[str], options: dict[str, Any], repeats: int) -> dict[str, dict[str, Any]]:
    """The table: for each model what its process says, its runs, and their medians."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, models = {}, [], {}
    for source in sources:  # one after the other, since loading takes more memory than the model
        pipes[source], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(source, options, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        try:
            models[source] = pipes[source].recv() | {"runs": {"prefill": [], "decode": []}}
        except EOFError:
            raise SystemExit(f"{source}: its process ended early; what it said is above") from None
    for repeat in range(repeats):
        for source in sources[repeat % len(sources) :] + sources[: repeat % len(sources)]:
            pipes[source].send("go")
            for part, seconds in pipes[source].recv().items():
                models[source]["runs"][part].append(seconds)
    for source, process in zip(sources, processes):
        pipes[source].send("stop")
        models[source] |= pipes[source].recv()
        process.join()
        models[source]["seconds"] = {part: statistics.median(runs) for part, runs in models[source]["runs"].items()}
    return models


def show(models: dict[str, dict[str, Any]]) -> None:
    width = max(map(len, models))
    print(f"{'model':{width}}  parameters    file MB  peak MB  prefill s          decode ms/step")
    for name, row in models.items():
        on_disk = f"{row['file_bytes'] / 1e6:10.1f}" if row["file_bytes"] else " " * 9 + "-"
        print(
            f"{name:{width}} {row['parameters']:11,} {on_disk} {row['peak_memory_bytes'] / 1e6:8.0f}"
            f" {row['seconds']['prefill']:10.3f} {row['speedup']['prefill']:5.2f}x"
            f" {1e3 * row['seconds']['decode']:11.2f} {row['speedup']['decode']:5.2f}x"
        )


if __name__ == "__main__":
    main()
