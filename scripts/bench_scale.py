"""Peak memory and seconds per block against width and number of blocks, on random checkpoints.

    python scripts/bench_scale.py --shapes llama-7b --layers 4 8 --out scale.json --plot scale.svg
    python scripts/bench_scale.py --shapes llama-70b moe-671b --divide 4 --layers 2 4    # narrower, in the same ratios
    python scripts/bench_scale.py --shapes tiny --layers 2 4              # seconds, to see that it works

Each run is a process of its own, `jprune prune`, over a checkpoint of `make_checkpoint` (in --folder, and removed
afterwards). Its peak memory is the process's own high-water mark. Its CPU seconds are those of all its threads: on a
machine that others use too they say more than the clock. `--plan` is asked before, in a process whose clock is its CPU
time, so that what it says are CPU seconds too. Two numbers of blocks give seconds per block without what comes once
(starting, compiling), and from these the whole model is extrapolated, which is marked so.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import make_checkpoint
import numpy as np
from machine import describe


def words(model: Path, tokens: Path, args: argparse.Namespace) -> list[str]:
    """Of the command, for the run and for its plan."""
    found = ["prune", args.method, str(model), "--sparsity", "0.5", "--calibration", str(tokens), "--json"]
    found += [word for regex in args.skip for word in ("--skip", regex)]
    return [*found, "--memory", args.memory] if args.memory else found


def prune(command: list[str]) -> dict:
    """One run: the command's JSON, with the seconds of the process and the CPU seconds of its threads."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "jprune", *command], check=True, stdout=subprocess.PIPE)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = json.loads(done.stdout.splitlines()[-1])
    return {
        "peak_memory_bytes": result["peak_memory_bytes"],
        "process_seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "seconds": result["seconds"],
    }


def plan(command: list[str]) -> dict:
    """What `--plan` says beforehand, in CPU seconds."""
    program = "import sys, time; time.perf_counter = time.process_time\n"
    program += "from jprune.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, *command, "--plan"], check=True, stdout=subprocess.PIPE)
    result = json.loads(done.stdout.splitlines()[-1])
    own = {key: result[key] for key in ("peak_memory_bytes", "flops")}
    return {**own, "cpu_seconds": round(result["seconds"], 1)}


def extrapolate(runs: list[dict], blocks: int) -> dict | None:
    """Seconds per block from the smallest and the largest number of blocks, and of a model of `blocks` of them."""
    first, last = min(runs, key=lambda r: r["blocks"]), max(runs, key=lambda r: r["blocks"])
    if first["blocks"] == last["blocks"]:
        return None
    result: dict = {"extrapolated": True, "blocks": blocks}
    for key in ("process_seconds", "cpu_seconds"):
        each = (last[key] - first[key]) / (last["blocks"] - first["blocks"])
        result[f"{key}_per_block"] = round(each, 1)
        result[key] = round(last[key] + each * (blocks - last["blocks"]))
    result["peak_memory_ratio"] = round(last["peak_memory_bytes"] / first["peak_memory_bytes"], 4)
    return result


def table(runs: list[dict]) -> str:
    """Markdown: what was said beforehand, and what came; seconds as those of the blocks beyond the fewest."""
    head = ["shape", "blocks", "peak, GiB", "`--plan` had said", "ratio", "CPU seconds", "of blocks beyond the fewest"]
    head += ["`--plan` had said", "ratio"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for run in runs:
        first = min((r for r in runs if r["shape"] == run["shape"]), key=lambda r: r["blocks"])
        peak, planned = (x["peak_memory_bytes"] / 2**30 for x in (run, run["planned"]))
        cells = [run["shape"], run["blocks"], f"{peak:.2f}", f"{planned:.2f}", f"{planned / peak:.2f}"]
        cells += [f"{run['cpu_seconds']:.0f}"]
        more = [run[key] - first[key] for key in ("blocks", "cpu_seconds")]
        said = run["planned"]["cpu_seconds"] * more[0] / run["blocks"]
        cells += [f"{more[1]:.0f}", f"{said:.0f}", f"{said / more[1]:.2f}"] if more[0] else ["", "", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(runs: list[dict]) -> str:
    """Two panels: peak memory in GiB, and CPU seconds, against the number of blocks; a line for each shape."""
    panels = (("peak memory, GiB", "peak_memory_bytes", 2**30), ("CPU seconds", "cpu_seconds", 1))
    colours = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e")
    most_blocks = max(run["blocks"] for run in runs)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="720" height="300" fill="white"/>')
    for i, (title, key, unit) in enumerate(panels):
        left, top, width, height = 60 + 350 * i, 40, 270, 200
        most = 1.15 * max(run[key] / unit for run in runs)
        parts.append(f'<text x="{left}" y="24">{title}</text>')
        parts.append(f'<path d="M{left} {top}v{height}h{width}" fill="none" stroke="black"/>')
        for share in (0, 0.5, 1):
            y = top + height * (1 - share)
            parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{most * share:.3g}</text>')
        for blocks in sorted({run["blocks"] for run in runs}):
            x = left + width * blocks / most_blocks
            parts.append(f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{blocks}</text>')
        parts.append(f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">blocks</text>')
        for shape, colour in zip(dict.fromkeys(run["shape"] for run in runs), colours, strict=False):
            points = [
                (left + width * run["blocks"] / most_blocks, top + height * (1 - run[key] / unit / most))
                for run in sorted(runs, key=lambda r: r["blocks"])
                if run["shape"] == shape
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
            x, y = points[-1]
            parts.append(f'<text x="{x:.0f}" y="{y - 8:.0f}" text-anchor="end" fill="{colour}">{shape}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-7b"], choices=make_checkpoint.WIDTHS)
    parser.add_argument("--divide", type=int, default=1, help="widths of the shapes are divided by this")
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--method", default="sparsegpt", choices=["sparsegpt", "wanda", "magnitude"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--memory", help="as of `jprune prune`")
    parser.add_argument("--skip", nargs="+", default=[], help="as of `jprune prune`")
    parser.add_argument("--folder", type=Path, help="for checkpoints; by default a temporary one")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--plot", type=Path, help="file for a plot, SVG")
    args = parser.parse_args()
    options = {key: value for key, value in vars(args).items() if key not in ("out", "plot", "folder")}
    result: dict = {"machine": describe(), "options": options, "runs": [], "whole models": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for shape in args.shapes:
            config = make_checkpoint.divided(make_checkpoint.hf_config("llama", shape), args.divide)
            tokens = Path(scratch) / "tokens.npy"
            size = (args.samples, args.sequence_length)
            np.save(tokens, np.random.default_rng(0).integers(0, config["vocab_size"], size, dtype=np.int32))
            runs = []
            for layers in args.layers:
                model, out = Path(scratch) / f"{shape}-{layers}", Path(scratch) / "pruned"
                make_checkpoint.write(model, make_checkpoint.random_checkpoint(config | {"num_hidden_layers": layers}))
                command = words(model, tokens, args)
                planned = plan(command)
                load = os.getloadavg()[0]
                runs.append({"shape": shape, "blocks": layers, "load": load, **prune([*command, "--out", str(out)])})
                runs[-1]["planned"] = planned
                print(json.dumps(runs[-1]), flush=True)
                shutil.rmtree(model)
                shutil.rmtree(out)
            result["runs"] += runs
            if whole := extrapolate(runs, config["num_hidden_layers"]):
                result["whole models"][shape] = whole
                print(json.dumps(whole), flush=True)
    print(table(result["runs"]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        args.plot.write_text(plot(result["runs"]))


if __name__ == "__main__":
    main()
