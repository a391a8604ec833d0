"""Tries every causal language model of transformers; writes docs/results/bridge.json and a table of docs/families.md.

    python scripts/make_bridge_table.py [--out docs/results/bridge.json] [--kinds mamba gpt_neo] [--again refused]

For every model_type of transformers' mapping of causal language models, a tiny model of random weights is made and
saved by transformers and opened by jprune: natively, or through PyTorch's module. Logits of 2 x 24 tokens are compared
in float32; then SparseGPT prunes half of every kernel, and the folder is held against the one that it was made from
and against what transformers computes of it. Processes try some models each, every one with a time limit. What is in
the JSON is not tried again, unless its state is named (`unpruned`: it works, and SparseGPT was not run). About an hour
and a half on two cores.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "reference"))
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
LIMIT, AT_ONCE = 240, 10
BEGIN, END = "<!-- scripts/make_bridge_table.py begins -->", "<!-- ends -->"


def attempt(kind, prune=True):
    """What came of one model_type."""
    import tiny_configs
    import torch

    from jprune.checkpoints import load
    from jprune.errors import JpruneError

    row = {"kind": kind, "architecture": tiny_configs.KINDS[kind]}
    tokens = tiny_tokens(2, 24)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        try:
            model = tiny_configs.model(kind)
            with torch.no_grad():
                want = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()
            model.save_pretrained(source)
        except Exception as error:
            return row | {"state": "not tried", "reason": short(error, folder)}
        del model
        try:
            checkpoint = load(source)
            row |= compared(checkpoint, tokens, want)
            return row | (pruned(checkpoint, Path(folder)) if prune and row["state"] == "works" else {})
        except (JpruneError, TimeoutError) as error:
            return row | {"state": "refused", "reason": short(error, folder)}
        except Exception as error:
            return row | {"state": "failed", "reason": short(error, folder)}


def tiny_tokens(windows, length):
    import numpy as np
    import tiny_configs

    return np.random.default_rng(1).integers(3, tiny_configs.VOCAB, (windows, length)).astype(np.int32)


def short(error, folder):
    text = str(error).replace(f"{folder}/source: ", "").strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:400] if text else type(error).__name__


def logits(checkpoint, tokens):
    """Block by block, on whichever road."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    model = checkpoint.model
    x = jax.jit(model.embed)({"embed": checkpoint.params("embed")}, jnp.asarray(tokens))
    for i, block in enumerate(model.blocks):
        x = jax.jit(block)(checkpoint.params(f"blocks/{i}"), x)
    return np.asarray(jax.jit(model.head)({name: checkpoint.params(name) for name in model.head_parts}, x))


def compared(checkpoint, tokens, want):
    """The largest difference of a logit, and which share of the layers' parameters the kernels hold."""
    import numpy as np

    from jprune.anatomy.kernels import prunable

    kernels = prunable(checkpoint)
    inside = [path for path in checkpoint.shapes if path.startswith(("blocks/", "unused/"))]
    left = sorted(set(inside) - set(kernels), key=lambda path: -checkpoint.count([path]))
    difference, largest = float(np.abs(logits(checkpoint, tokens) - want).max()), float(np.abs(want).max())
    return {
        "state": "works" if difference <= 1e-4 * max(1.0, largest) else "differs",
        "road": checkpoint.road,
        "kernels": len(kernels),
        "share": checkpoint.count(kernels) / checkpoint.count(inside),
        "left": {path: checkpoint.count([path]) for path in left if len(checkpoint.shapes[path].shape) > 1},
        "difference": difference,
        "largest": largest,
    }


def pruned(checkpoint, folder):
    """Whether SparseGPT leaves half of every kernel, all else bit for bit, and a folder that transformers computes."""
    import numpy as np
    import torch
    import transformers

    from jprune.anatomy.kernels import prunable
    from jprune.checkpoints import load
    from jprune.methods import SparseGPT
    from jprune.patterns import Unstructured
    from jprune.pipeline import prune_model

    options = {"calibration": tiny_tokens(2, 24), "expert_tokens": 0}
    prune_model(checkpoint, folder / "out", method=SparseGPT(), pattern=Unstructured(0.5), **options)
    after, kernels = load(folder / "out"), set(prunable(checkpoint))
    for path in checkpoint.shapes:
        values = after.read(path)
        if path in kernels:
            assert abs((values == 0).mean() - 0.5) < 0.02, f"{path} has {(values == 0).mean():.1%} zeros"
        else:
            assert values.tobytes() == checkpoint.read(path).tobytes(), f"{path} is not what it was"
    cls = getattr(transformers, checkpoint.hf_config["architectures"][0])
    model, info = cls.from_pretrained(
        folder / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), f"transformers reads the result with {info}"
    tokens = tiny_tokens(2, 24)
    with torch.no_grad():
        want = model.eval()(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()
    difference = float(np.abs(logits(after, tokens) - want).max())
    assert difference <= 1e-4 * max(1.0, float(np.abs(want).max())), f"pruned, logits differ by {difference}"
    return {"pruned": difference}


def work(kinds, out, prune):
    """Tries some, each within a time limit."""
    import logging

    import jax
    import torch
    import transformers

    def over(*_):
        raise TimeoutError(f"took more than {LIMIT} seconds")

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("jprune").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, over)
    for kind in kinds:
        start = time.time()
        signal.alarm(LIMIT)
        row = attempt(kind, prune)
        signal.alarm(0)
        with out.open("a") as file:
            file.write(json.dumps(row | {"seconds": round(time.time() - start, 1)}) + "\n")
        jax.clear_caches()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "bridge.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--kinds", nargs="*", help="only these model_types")
    parser.add_argument("--again", nargs="*", default=(), help="try again what is in one of these states")
    parser.add_argument("--logits-only", action="store_true", help="do not prune")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.kinds, args.worker, not args.logits_only)
    import tiny_configs

    known = json.loads(args.out.read_text())["models"] if args.out.exists() else []
    stays = [row for row in known if not states(row) & {*args.again} and row["kind"] not in (args.kinds or ())]
    rows = {row["kind"]: row for row in stays}
    missing = [kind for kind in args.kinds or tiny_configs.KINDS if kind not in rows]
    while missing:
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "rows.jsonl"
            command = [sys.executable, __file__, "--worker", str(lines), "--kinds", *missing[:AT_ONCE]]
            command += ["--logits-only"] if args.logits_only else []
            environment = {"XLA_FLAGS": QUICK, **os.environ}
            subprocess.run(command, env=environment, timeout=LIMIT * (AT_ONCE + 1), check=False)
            found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        if len(found) < len(missing[:AT_ONCE]):  # the process died
            kind = missing[len(found)]
            dead = {"kind": kind, "architecture": tiny_configs.KINDS[kind], "state": "failed"}
            found.append(dead | {"reason": "its process died"})
        rows |= {row["kind"]: row for row in found}
        missing = missing[len(found) :]
        write(args.out, rows, tiny_configs.KINDS)
        print(f"{len(missing)} left", flush=True)
    write(args.out, rows, tiny_configs.KINDS)
    write_page(args.page, [rows[kind] for kind in tiny_configs.KINDS if kind in rows])


def states(row):
    """What `--again` may call a row."""
    return {row["state"]} | ({"unpruned"} if row["state"] == "works" and "pruned" not in row else set())


def write(out, rows, kinds):
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", "torchax", "transformers")}
    about = {"hardware": f"CPU, {os.cpu_count()} cores", "versions": versions}
    out.parent.mkdir(parents=True, exist_ok=True)
    models = [rows[kind] for kind in kinds if kind in rows]
    out.write_text(json.dumps(about | {"models": models}, indent=1) + "\n")


def counted(rows):
    """The sentences above the table."""
    works = [row for row in rows if row["state"] == "works"]
    native = sum(row["road"] == "native" for row in works)
    pruned = sum("pruned" in row for row in works)
    refused, untried = (sum(row["state"] == state for row in rows) for state in ("refused", "not tried"))
    others = len(rows) - len(works) - refused - untried
    lines = [
        f"Of the {len(rows)}, {len(works)} work: {len(works) - native} through PyTorch's module and {native} natively. "
        f"{refused} are refused, with the reason; {untried} were not tried.",
        f"Of those that work, {pruned} were pruned by SparseGPT, and held against the source and transformers.",
    ]
    return "\n".join([*lines, *([f"{others} differ or fail; see the table."] if others else [])])


def write_page(page, rows):
    """The table between two comments of a page."""
    roads = {"native": "native", "PyTorch's module": "module"}
    lines = ["| model_type | architecture | road | difference of a logit | kernels, % | left out | SparseGPT |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        names = f"| `{row['kind']}` | `{row['architecture']}` |"
        if row["state"] != "works":
            reason = row.get("reason", "traced, logits not compared" if row["state"] == "opened" else "")
            if row["state"] == "differs":
                reason = f"by {row['difference']:.1e}"
            lines.append(f"{names} {row['state']} | {reason.removeprefix('JpruneError: ').replace('|', '/')} | | | |")
            continue
        left = ", ".join(dict.fromkeys(path.split("/", 2)[2] for path in row["left"] if path.startswith("blocks/")))
        unread = any(path.startswith("unused/") for path in row["left"])
        left = "; ".join(filter(None, [left, "what no call on tokens reads" if unread else ""]))
        relative, share = row["difference"] / max(1.0, row["largest"]), 100 * row["share"]
        did = "pruned" if "pruned" in row else "not run"
        lines.append(f"{names} {roads[row['road']]} | {relative:.1e} | {share:.1f} | {left} | {did} |")
    text = page.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{counted(rows)}\n\n{chr(10).join(lines)}\n{END}{after}")


if __name__ == "__main__":
    main()
