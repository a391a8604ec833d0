"""Strong and weak scaling of a one-shot run over virtual devices, by counted work and bytes, not by seconds.

    python scripts/bench_scaling.py [--methods sparsegpt wanda] [--devices 1 2 4 8] [--out scaling.json]

Every row is a run of `jprune.prune_model` over a mesh of so many CPU devices: as many windows of calibration in all
(strong), or on each device (weak). Of all that the run computes (`counted`) two things are taken: the operations of the
device that has most to do, and the bytes that one device sends to others. `efficiency` is what that device does when it
is alone, over devices x what it does now (strong), or over what it does now (weak). Virtual devices share the cores of
one machine: how long a run takes says nothing about several, and is not looked at. A mesh such as 4x2 has a model axis.
"""

import argparse
import functools
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import make_checkpoint
import numpy as np
from counted import Counted, Program, Work
from machine import describe

import jprune
from jprune import devices

METHODS = {"sparsegpt": jprune.SparseGPT, "wanda": jprune.Wanda}
PHASES = {"observe": "calibration", "finish": "calibration", "embed": "calibration", "merge": "sums"}
PHASES |= {"factorise": "factorise", "sweep_blocks": "solve", "without_lowest": "solve", "_score": "solve"}
Row = dict[str, Any]


def axes(mesh: str) -> tuple[int, int]:
    """Devices along data and along model."""
    data, _, model = mesh.partition("x")
    return int(data), int(model or 1)


def count(method: str, mesh: str, windows: int, args: argparse.Namespace) -> Row:
    """One run: operations and bytes of a device, by phase."""
    data, model = axes(mesh)
    config = make_checkpoint.divided(make_checkpoint.hf_config("llama", args.shape), args.divide)
    checkpoint = make_checkpoint.random_checkpoint(config | {"num_hidden_layers": args.layers}, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (windows, args.sequence_length), np.int32)
    with tempfile.TemporaryDirectory() as folder, Counted() as counted:
        jprune.prune_model(
            checkpoint,
            Path(folder) / "pruned",
            method=METHODS[method](),
            pattern=jprune.Unstructured(0.5),
            mesh=devices.make_mesh(model, devices=jax.devices()[: data * model]),
            calibration=tokens,
        )
    phases: dict[str, Work] = {}
    for name, text, _, runs in counted.programs:
        phase = PHASES.get(name, "others")
        phases[phase] = phases.get(phase, Work()) + Program(text).work.times(runs)
    whole = sum(phases.values(), Work())
    return {
        "method": method,
        "mesh": mesh,
        "devices": data * model,
        "windows": windows,
        "flops": {phase: by_kind(work.flops) for phase, work in phases.items()},
        "busiest_flops": round(sum(whole.flops.values())),
        "sent_bytes": {phase: by_kind(work.sent) for phase, work in phases.items() if work.sent},
        "sent_bytes_in_all": round(sum(whole.sent.values())),
        "messages": whole.messages,
        "moved_bytes": by_kind(counted.puts),
    }


def by_kind(counts: Counter[str]) -> dict[str, int]:
    return {kind: round(value) for kind, value in counts.items()}


def table(rows: list[Row]) -> str:
    """Markdown: a line for every run."""
    phases = ("calibration", "factorise", "solve")
    head = ["", "devices", *(f"{phase}, GFLOP" for phase in (*phases, "others")), "efficiency", "sent, MB"]
    head += ["messages", "copied, MB", "through the host, MB"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        flops = {phase: sum(kinds.values()) / 1e9 for phase, kinds in row["flops"].items()}
        others = sum(flops.values()) - sum(flops.get(phase, 0) for phase in phases)
        cells = [f"{row['method']}, {row['scaling']}", row["mesh"], *(f"{flops.get(p, 0):.3g}" for p in phases)]
        cells += [f"{others:.2g}", f"{row['efficiency']:.0%}", f"{row['sent_bytes_in_all'] / 1e6:.1f}"]
        cells += [str(row["messages"])]
        cells += [f"{row['moved_bytes'].get(kind, 0) / 1e6:.1f}" for kind in ("copies", "through the host")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--devices", nargs="+", default=["1", "2", "4", "8", "4x2"], help="or meshes DATAxMODEL")
    parser.add_argument("--shape", default="llama-7b", choices=make_checkpoint.WIDTHS)
    parser.add_argument("--divide", type=int, default=8, help="widths of the shape are divided by this")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--windows", type=int, default=128, help="strong: in all; weak: on 8 devices")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    rows: list[Row] = []
    known = functools.cache(functools.partial(count, args=args))  # strong and weak scaling end with the same run
    for method in args.methods:
        for scaling in ("strong", "weak"):
            alone = 0.0
            for mesh in args.devices:
                many = math.prod(axes(mesh))
                strong = scaling == "strong"
                windows = args.windows if strong else args.windows // 8 * many
                row = {"scaling": scaling, **known(method, mesh, windows)}
                work = row["busiest_flops"] * (many if strong else 1)
                alone = alone or work
                row["efficiency"] = alone / work
                rows.append(row)
                print(json.dumps(row), flush=True)
    print(table(rows))
    if args.out:
        options = {key: value for key, value in vars(args).items() if key != "out"}
        args.out.write_text(json.dumps({"machine": describe(), "options": options, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
