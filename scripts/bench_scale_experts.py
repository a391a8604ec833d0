"""Peak memory of runs on a model with many experts against its number of blocks, on random checkpoints.

    python scripts/bench_scale_experts.py --out scale_experts.json    # Qwen3-30B-A3B's shape, a quarter of an hour
    python scripts/bench_scale_experts.py --divide 16 --layers 1 2    # narrower, seconds

`prune experts` removes a quarter of the experts (REAP), `prune sparsegpt` half of the weights. Each run is a process of
its own (see `bench_scale`), over a checkpoint of `make_checkpoint` in --folder, removed afterwards. The calibration
text is random and short, fewer tokens for an expert than real runs give it; so `--expert-tokens 1` has all those
solved for that were sent a token.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import make_checkpoint
import numpy as np
from bench_scale import plan, prune
from machine import describe


def commands(model: Path, tokens: Path, experts: int, args: argparse.Namespace) -> dict[str, list[str]]:
    """Of both runs, without where the result goes."""
    given = [str(model), "--calibration", str(tokens), "--json"]
    windows = ["--examples", str(args.samples), "--sequence-length", str(args.sequence_length)]
    solved = ["--sparsity", "0.5", "--expert-tokens", "1", "--memory", args.memory]
    return {
        "experts": ["prune", "experts", *given, "--remove", str(experts // 4), *windows],
        "sparsegpt": ["prune", "sparsegpt", *given, *solved],
    }


def table(runs: list[dict]) -> str:
    """Markdown: a line for each run."""
    head = ["", "blocks", "peak memory, GiB", "`--plan` had said", "CPU seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for run in sorted(runs, key=lambda run: (run["method"], run["blocks"])):
        said = f"{run['planned']['peak_memory_bytes'] / 2**30:.2f}" if "planned" in run else ""
        cells = [run["method"], run["blocks"], f"{run['peak_memory_bytes'] / 2**30:.2f}", said]
        lines.append(f"| {' | '.join(map(str, [*cells, round(run['cpu_seconds'])]))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="moe-30b-a3b", choices=make_checkpoint.EXPERTS)
    parser.add_argument("--divide", type=int, default=1, help="widths of the shape are divided by this")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--memory", default="9GB", help="as of `jprune prune`")
    parser.add_argument("--folder", type=Path, help="for checkpoints; by default a temporary one")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    options = {key: value for key, value in vars(args).items() if key not in ("out", "folder")}
    config = make_checkpoint.divided(make_checkpoint.hf_config("llama", args.shape), args.divide)
    result: dict = {"machine": describe(), "options": options, "runs": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        tokens, out = Path(scratch) / "tokens.npy", Path(scratch) / "pruned"
        size = (args.samples, args.sequence_length)
        np.save(tokens, np.random.default_rng(0).integers(0, config["vocab_size"], size, dtype=np.int32))
        for layers in args.layers:
            model = Path(scratch) / f"model-{layers}"
            make_checkpoint.write(model, make_checkpoint.random_checkpoint(config | {"num_hidden_layers": layers}))
            for method, command in commands(model, tokens, config["num_experts"], args).items():
                planned = {} if method == "experts" else {"planned": plan(command)}
                run = {"method": method, "blocks": layers, **prune([*command, "--out", str(out)]), **planned}
                result["runs"].append(run)
                print(json.dumps(run), flush=True)
                shutil.rmtree(out)
            shutil.rmtree(model)
    print(table(result["runs"]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
