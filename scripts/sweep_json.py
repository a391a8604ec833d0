"""Puts what a sweep has measured so far, with the machine, into a JSON for the docs.

    jprune sweep demo --methods sparsegpt --sparsities 0.5,0.6,0.7,2:4 --sequence-length 512 --out grid
    python scripts/sweep_json.py grid --out docs/results/sweep_cpu.json

Cells that are not done are left out, and printed. Seconds and memory are those of a machine that may be shared with
other work: they stay in the sweep's own file.
"""

import argparse
import json
from pathlib import Path

import machine

MEASURED = ("sparsity", "perplexity", "change", "divergence", "tail", "agreement")


def collected(sweep: dict) -> dict:
    """What was asked for and what came out, of the cells that are done."""
    cells = [
        {"method": asked["method"], "pattern": asked["pattern"], **{name: own[name] for name in MEASURED}}
        for asked, own in zip(sweep["grid"]["cells"], sweep["cells"], strict=True)
        if own and "perplexity" in own
    ]
    return {
        "model": sweep["grid"]["model"],
        "calibration": sweep["grid"]["cells"][0]["calibration"],
        "evaluation": sweep["grid"]["evaluation"],
        "dense": {name: sweep["dense"][name] for name in ("sparsity", "perplexity")},
        "cells": cells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of a sweep")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sweep = json.loads((args.sweep / "sweep.json").read_text(encoding="utf-8"))
    args.out.write_text(json.dumps({**collected(sweep), **machine.describe()}, indent=1) + "\n", encoding="utf-8")
    for asked, own in zip(sweep["grid"]["cells"], sweep["cells"], strict=True):
        if not own or "perplexity" not in own:
            print(f"left out: {asked['name']} {asked['pattern']}")


if __name__ == "__main__":
    main()
