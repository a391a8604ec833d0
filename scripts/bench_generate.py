"""Times our own text generation with several checkpoints against a baseline: how much faster a smaller model is.

    python scripts/bench_generate.py --baseline DIR MODEL [MODEL ...] [--prompt-length 256] [--tokens 64] [--json]

Each model has a process of its own, which loads it, generates once to compile, and then waits; the processes take
turns, one generation each, so that whatever slows the machine down slows all of them. Times are medians over the
repeats. The prompt is random tokens, the same for all models; every run yields exactly --tokens tokens, greedily.

prefill   seconds until the first token of the answer is there (the prompt goes through the model at once)
decode    seconds per token after it (a token at a time, with the key/value cache)
memory    the most host memory the process had, reading the file included; and the most on the accelerator
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


def worker(source: str, options: dict[str, Any], pipe: Connection) -> None:
    """Generates whenever it is asked to; says what the model is at the beginning and its peak memory at the end."""
    import jax
    import jax.numpy as jnp

    import jprune
    from jprune.checkpoints.dtypes import activation_dtype
    from jprune.models.config import describe as sizes
    from jprune.models.generate import stream
    from jprune.runs.stopwatch import peak_device_memory_bytes, peak_memory_bytes

    checkpoint = jprune.load(source)
    dtype = jnp.dtype(activation_dtype(checkpoint, options["dtype"]))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), checkpoint.params())
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, min(checkpoint.config.vocab, options["vocab"]), options["prompt_length"]).tolist()

    def generate() -> dict[str, float]:
        start = time.perf_counter()
        at = [time.perf_counter() for _ in stream(checkpoint.config, params, prompt, max_tokens=options["tokens"])]
        return {"prefill": at[0] - start, "decode": (at[-1] - at[0]) / (len(at) - 1)}

    generate()
    count = checkpoint.parameters
    pipe.send(
        {
            "parameters": count,
            "weight_bytes": count * dtype.itemsize,
            "dtype": dtype.name,
            "file_bytes": file_bytes(source),
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

    return jprune.load(source).config.vocab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="what jprune.load takes")
    parser.add_argument("--baseline", required=True, help="what they are compared with")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="to generate, at least 2")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", help="of weights and activations; by default float32 on CPU, else what they have")
    parser.add_argument("--json", action="store_true", help="make the last line of stdout one JSON object")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    args = parser.parse_args()
    if args.tokens < 2 or args.repeats < 1:
        parser.error("expected --tokens of at least 2 and --repeats of at least 1")
    sources = [args.baseline, *(model for model in args.models if model != args.baseline)]
    options = {
        "prompt_length": args.prompt_length,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "vocab": min(vocabulary(source) for source in sources),
    }
    # A GPU is shared by all processes: none may take it whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    models = measure(sources, options, args.repeats)
    baseline = models[args.baseline]
    for row in models.values():
        row["speedup"] = {part: baseline["seconds"][part] / row["seconds"][part] for part in ("prefill", "decode")}
        row["smaller"] = baseline["parameters"] / row["parameters"]
    result = {
        "machine": describe(),
        "options": {k: v for k, v in options.items() if k != "vocab"} | {"repeats": args.repeats},
        "baseline": args.baseline,
        "models": models,
    }
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
    print(f"{'model':{width}}  parameters    file MB  peak MB  prefill s         decode ms/token")
    for name, row in models.items():
        on_disk = f"{row['file_bytes'] / 1e6:10.1f}" if row["file_bytes"] else " " * 9 + "-"
        print(
            f"{name:{width}} {row['parameters']:11,} {on_disk} {row['peak_memory_bytes'] / 1e6:8.0f}"
            f" {row['seconds']['prefill']:10.3f} {row['speedup']['prefill']:5.2f}x"
            f" {1e3 * row['seconds']['decode']:11.2f} {row['speedup']['decode']:5.2f}x"
        )


if __name__ == "__main__":
    main()
