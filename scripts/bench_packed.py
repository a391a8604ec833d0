"""What packing a pruned model saves and costs: files, kernels, rounding, perplexity, and the memory that it takes.

    python scripts/bench_packed.py PRUNED [--text pydoc] [--windows 4] [--values none int8] --out packed_cpu.json

PRUNED is what `jprune.load` takes. It is packed into a folder beside --out by `jprune pack`, in a process of its own,
whose peak memory is noted. The perplexity is measured three times: of the model as it came, of the packed folder as
`jprune eval` reads it, and by the decoder multiplying by the packed kernels.

    python scripts/bench_packed.py --random llama-7b --layers 2 --out packed_7b_cpu.json

takes random weights in the shape of a model instead (`make_checkpoint.py`), half of them zero, and no perplexity.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import make_checkpoint
import numpy as np
from machine import describe

import jprune
from jprune.checkpoints import Checkpoint, huggingface
from jprune.data.for_model import evaluation_windows
from jprune.models import decoder


def pack(source: str, out: Path, values: str) -> dict[str, Any]:
    """Runs `jprune pack`; gives its report."""
    words = [] if values == "none" else ["--values", values]
    command = [sys.executable, "-m", "jprune", "pack", source, "--out", str(out), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {
        key: value for key, value in json.loads(done.stdout.splitlines()[-1]).items() if key not in ("kernels", "out")
    }


def half_of_random(folder: Path, shape: str, layers: int) -> Path:
    """Writes random weights of which half of every block's are zero."""
    config = make_checkpoint.hf_config("llama", shape) | {"num_hidden_layers": layers}
    checkpoint = make_checkpoint.random_checkpoint(config)
    rng = np.random.default_rng(0)
    folder.mkdir()
    with huggingface.Writer(folder, checkpoint) as writer:
        for path in checkpoint.shapes:
            values = checkpoint.read(path)
            if path.startswith("blocks/") and path.endswith("kernel"):
                values = np.where(rng.random(values.shape, np.float32) < 0.5, values, values.dtype.type(0))
            writer.write(path, values)
    return folder


def files(folder: Path) -> int:
    """Bytes of the files of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def by_packed_kernels(checkpoint: Checkpoint, tokens: np.ndarray) -> float:
    """Perplexity with kernels packed while the decoder runs; a block at a time."""
    config = checkpoint.config
    x = decoder.embed(config)({"embed": checkpoint.params("embed")}, jnp.asarray(tokens)).astype(jnp.float32)

    for index in range(config.layers):
        x = jax.jit(decoder.block(config, index))(checkpoint.params(f"blocks/{index}", packed=True), x)
    head = {name: checkpoint.params(name) for name in decoder.head_parts(config)}
    total = 0.0
    for hidden, window in zip(x, tokens):
        logits = jax.nn.log_softmax(decoder.head(config)(head, hidden[None])[0, :-1])
        total -= float(jnp.take_along_axis(logits, jnp.asarray(window)[1:, None], axis=1).mean())
    return float(np.exp(total / len(tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--random", choices=make_checkpoint.WIDTHS, help="random weights in this shape instead")
    parser.add_argument("--layers", type=int, default=2, help="of random weights")
    parser.add_argument("--values", nargs="+", default=["none", "int8"])
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON")
    parser.add_argument("--keep", type=Path, help="folder for the packed models; otherwise they are removed")
    args = parser.parse_args()
    if (args.model is None) == (args.random is None):
        parser.error("expected a model, or --random with a shape")
    folder = args.keep or Path(tempfile.mkdtemp(dir=args.out.parent))
    source = args.model or str(half_of_random(folder / "random", args.random, args.layers))
    checkpoint = jprune.load(source)
    result: dict[str, Any] = {
        "machine": describe(),
        "sizes": {"layers": checkpoint.config.layers, "d_model": checkpoint.config.d_model},
        "dtype": checkpoint.shapes["embed/embedding"].dtype.name,
        "bytes": checkpoint.nbytes,
        "packed": {},
    }
    windows = None
    if args.model is not None:
        from jprune.evaluate.perplexity import perplexity

        windows = evaluation_windows(checkpoint, args.text, length=args.length, count=args.windows).tokens
        result["text"] = {"source": args.text, "windows": args.windows, "length": args.length}
        result["perplexity"] = perplexity(checkpoint, windows).value
    for values in args.values:
        out = folder / f"packed-{values}"
        row = pack(source, out, values)
        row["file_bytes"] = files(out)
        row["share_of_dense"] = row["file_bytes"] / checkpoint.nbytes
        row["kernels_share_of_dense"] = row["kernel_bytes"] / row["kernel_bytes_before"]
        if windows is not None:
            packed = jprune.load(out)
            row["perplexity"] = perplexity(packed, windows).value
            row["perplexity_by_packed_kernels"] = by_packed_kernels(packed, windows)
        result["packed"][values] = row
        print(values, json.dumps({k: v for k, v in row.items() if k != "formats"}), flush=True)
    if args.keep is None:
        shutil.rmtree(folder)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
