"""Feeds jprune damaged files of every kind that it reads, and looks for anything but a result or a `JpruneError`.

    python scripts/fuzz.py --inputs 10000                   # of all kinds, by turns
    python scripts/fuzz.py --kinds gguf,index --minutes 30 --seed 7
    python scripts/fuzz.py --again FOLDER                   # inputs that were found before

A finding is another exception, a process that dies, more than ten seconds, more than 1 GiB of memory, or a file touched
outside the input's folder. Its input is kept below --found, with what went wrong beside it.
"""

import argparse
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from fuzz_inputs import (
    LLAMA,
    RECORD,
    ROWS,
    as_json,
    configs,
    damaged_bytes,
    damaged_json,
    damaged_tree,
    gguf,
    parquet,
    safetensors,
    tensors,
    tokenizer,
)

SECONDS = 10
BYTES = 2**30
NOTE = "finding.txt"
Make = Callable[[Path, random.Random], None]


class _TooLong(BaseException):
    pass


def _model(folder: Path, *, weights: bool = True) -> None:
    (folder / "config.json").write_bytes(as_json(LLAMA))
    if weights:
        (folder / "model.safetensors").write_bytes(safetensors(tensors()))


def make_safetensors(folder: Path, rng: random.Random) -> None:
    _model(folder, weights=False)
    data = safetensors(tensors(), (lambda header: damaged_tree(header, rng)) if rng.random() < 0.7 else lambda h: h)
    (folder / "model.safetensors").write_bytes(damaged_bytes(data, rng) if rng.random() < 0.4 else data)


def make_index(folder: Path, rng: random.Random) -> None:
    _model(folder, weights=False)
    arrays = tensors()
    names = sorted(arrays)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for name, keys in shards.items():
        (folder / name).write_bytes(safetensors({key: arrays[key] for key in keys}))
    index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_bytes(damaged_json(index, rng))


def make_config(folder: Path, rng: random.Random) -> None:
    (folder / "config.json").write_bytes(damaged_json(rng.choice(configs()), rng))


def make_gguf(folder: Path, rng: random.Random) -> None:
    data = gguf()
    head = data.index(b"blk.0.") if rng.random() < 0.8 else len(data)  # most of the file are weights
    (folder / "model.gguf").write_bytes(damaged_bytes(data[:head], rng) + data[head:])


def make_tokenizer(folder: Path, rng: random.Random) -> None:
    _model(folder, weights=False)
    files = {"tokenizer.json": as_json(tokenizer())}
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    files["tokenizer_config.json"] = as_json({"chat_template": template, "eos_token": {"content": "w2"}})
    name = rng.choice(list(files))
    files[name] = damaged_json(json.loads(files[name]), rng)
    for each, data in files.items():
        (folder / each).write_bytes(data)


def make_texts(folder: Path, rng: random.Random) -> None:
    match rng.choice(["jsonl", "json", "txt", "npy", "parquet"]):
        case "jsonl":
            changed = damaged_tree(ROWS, rng) if rng.random() < 0.6 else ROWS
            lines = b"\n".join(map(as_json, changed if isinstance(changed, list) else [changed])) + b"\n"
            (folder / "data.jsonl").write_bytes(damaged_bytes(lines, rng) if rng.random() < 0.5 else lines)
        case "json":
            (folder / "data.json").write_bytes(damaged_json(ROWS, rng))
        case "txt":
            (folder / "data.txt").write_bytes(damaged_bytes(b"w1 w2 w3 \n" * 30, rng))
        case "npy":
            values = rng.choice([np.int32, np.int64, np.uint8, np.float32, "U3", bool])
            np.save(folder / "data.npy", np.arange(48).reshape(4, 12).astype(values))
            (folder / "data.npy").write_bytes(damaged_bytes((folder / "data.npy").read_bytes(), rng))
        case _:
            (folder / "data.parquet").write_bytes(damaged_bytes(parquet(), rng))


def make_recipe(folder: Path, rng: random.Random) -> None:
    _model(folder)
    recipe = {
        "method": "magnitude",
        "sparsity": 0.5,
        "per": "kernel",
        "skip": ["blocks/0/"],
        "overrides": {"mlp/down": "2:4"},
    }
    if rng.random() < 0.5:
        (folder / "recipe.json").write_bytes(damaged_json(recipe, rng))
    else:
        text = b'method = "magnitude"\nsparsity = 0.5\nskip = ["blocks/0/"]\n\n[overrides]\n"mlp/down" = "2:4"\n'
        (folder / "recipe.toml").write_bytes(damaged_bytes(text, rng))


def make_adapter(folder: Path, rng: random.Random) -> None:
    _model(folder)
    shapes = {"A": (2, LLAMA["hidden_size"]), "B": (LLAMA["num_attention_heads"] * LLAMA["head_dim"], 2)}
    start = "base_model.model.model"
    pair = {f"{start}.layers.0.self_attn.q_proj.lora_{n}.weight": np.ones(s, np.float32) for n, s in shapes.items()}
    pair[f"{start}.norm.weight"] = np.ones(LLAMA["hidden_size"], np.float32)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "alpha_pattern": {"q_proj": 3}}
    data = safetensors(pair, (lambda header: damaged_tree(header, rng)) if rng.random() < 0.4 else lambda h: h)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_bytes(damaged_json(config, rng))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(
        damaged_bytes(data, rng) if rng.random() < 0.2 else data
    )


def make_record(folder: Path, rng: random.Random) -> None:
    _model(folder)
    (folder / "jprune.json").write_bytes(damaged_json(RECORD, rng))


def make_run(folder: Path, rng: random.Random) -> None:
    _model(folder)
    run = folder / "out.run"
    (run / "done").mkdir(parents=True)
    from jprune.runs.folder import FORMAT_VERSION

    state = {"format_version": FORMAT_VERSION, "id": "0a1b2c3d", "decisions": {}}
    state["fingerprint"] = {"out": str((folder / "out").resolve()), "a": 1}
    for path, contents in (
        (run / "run.json", state),
        (run / "done" / "blocks-0.json", {"kernels": [], "seconds": 1.0}),
    ):
        whole = {"checksum": zlib.crc32(json.dumps(contents).encode()), "contents": contents}
        path.write_bytes(damaged_json(whole, rng) if rng.random() < 0.7 else as_json(whole))
    (run / "lock").write_bytes(damaged_json({"pid": 1, "host": "h"}, rng))


def use_checkpoint(folder: Path) -> None:
    from jprune.checkpoints import load

    adapter = folder / "adapter" if (folder / "adapter").exists() else None
    checkpoint = load(folder / "model.gguf" if (folder / "model.gguf").exists() else folder, adapter=adapter)
    checkpoint.described()
    for path in checkpoint.shapes:
        checkpoint.read(path)


def use_config(folder: Path) -> None:
    from jprune.checkpoints import load

    checkpoint = load(folder, weights=False)
    checkpoint.described()


def use_tokenizer(folder: Path) -> None:
    from jprune.checkpoints import load
    from jprune.data import chat

    checkpoint = load(folder, weights=False)
    if (words := checkpoint.tokenizer) is not None:
        words.decode(words.encode("w1 w2 unknown"))
    if (template := chat.template(checkpoint.side_files)) is not None:
        template.render([{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}])


def use_texts(folder: Path) -> None:
    from tokenizers import Tokenizer

    from jprune.data import calibration

    class Words:
        inner = Tokenizer.from_str(json.dumps(tokenizer()))

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return self.inner.encode(text, add_special_tokens=add_special_tokens).ids

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return self.inner.decode(ids)

    (data,) = folder.glob("data.*")
    calibration(data, Words(), samples=2, length=8, vocab_size=40)


def _command(*words: object) -> None:
    from jprune.cli import main

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
    assert status in (0, 1, 2), status


def use_recipe(folder: Path) -> None:
    (recipe,) = folder.glob("recipe.*")
    _command("prune", "magnitude", folder, "--recipe", recipe, "--plan")


def use_record(folder: Path) -> None:
    _command("info", folder, "--json")
    _command("prune", "magnitude", folder, "--recipe", folder / "jprune.json", "--plan")


def use_run(folder: Path) -> None:
    from jprune.runs.folder import RunFolder, finished

    finished(folder / "out.run", folder / "out")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with contextlib.suppress(*_refusals()):
            run = RunFolder(folder / "out.run", out=folder / "out", fingerprint={"a": 1}, **options)
            run.marked("blocks/0")
            run.close()


KINDS: dict[str, tuple[Make, Callable[[Path], None]]] = {
    "safetensors": (make_safetensors, use_checkpoint),
    "index": (make_index, use_checkpoint),
    "config": (make_config, use_config),
    "gguf": (make_gguf, use_checkpoint),
    "adapter": (make_adapter, use_checkpoint),
    "tokenizer": (make_tokenizer, use_tokenizer),
    "texts": (make_texts, use_texts),
    "recipe": (make_recipe, use_recipe),
    "record": (make_record, use_record),
    "run": (make_run, use_run),
}


COMMANDS = ("recipe", "record")
"""Kinds of which an input takes ten times as long, and comes seldom."""


def _refusals() -> tuple[type[BaseException], ...]:
    from jprune.errors import JpruneError

    return (JpruneError,)


def attempt(kind: str, folder: Path) -> str | None:
    """Uses an input; what is wrong, or None if it was accepted or refused."""
    inside = folder.resolve()
    touched: list[str] = []
    watched.append((inside, touched))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        KINDS[kind][1](folder)
    except _refusals():
        pass
    except _TooLong:
        return f"more than {SECONDS} s\n{traceback.format_exc()}"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watched.clear()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if more > BYTES:
        return f"{more / 2**20:.0f} MiB of memory"
    return f"touched outside: {touched[0]}" if touched else None


watched: list[tuple[Path, list[str]]] = []
"""The folder of the input at hand, and what was touched outside of it."""


def _watch(event: str, args: tuple) -> None:
    if not watched:
        return
    inside, touched = watched[0]
    if event == "pickle.find_class" or event in ("os.system", "subprocess.Popen"):
        touched.append(f"{event} {args[:2]}")
    writes = {"os.remove": 0, "os.rename": 1, "os.rmdir": 0, "os.mkdir": 0, "os.symlink": 1, "shutil.rmtree": 0}
    if event.startswith("os.") and isinstance(args[-1], int) and args[-1] >= 0:
        return  # relative to a folder that was opened, as shutil.rmtree does
    if event == "open" and isinstance(args[0], str | bytes) and args[2] is not None:
        path = args[0] if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
    else:
        path = args[writes[event]] if event in writes else None
    if isinstance(path, str | bytes | Path):
        where = Path(os.fsdecode(path)).absolute()
        allowed = (inside, Path("/dev"), Path(tempfile.gettempdir()) / "jprune-tokenizer", _cache())
        if not any(str(where).startswith(str(place)) for place in allowed):
            touched.append(f"{event} {where}")


def _cache() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"])


def work(number: int, kinds: list[str], seed: int, until: float, inputs: int, found: Path, told: multiprocessing.Queue):
    """One process: makes inputs and uses them."""
    scratch = Path(tempfile.mkdtemp(prefix=f"fuzz-{number}-"))
    os.environ |= {"XDG_CACHE_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(scratch / "cache" / "jax")
    signal.signal(signal.SIGALRM, _raise)
    import jprune.cli  # noqa: F401
    from jprune.checkpoints import load  # noqa: F401

    logging.disable()  # stderr is a file of each input, and closed after it
    _unwatched_first(kinds, scratch)
    sys.addaudithook(_watch)
    weights = [1 if kind in COMMANDS else 20 for kind in kinds]
    for i in range(inputs):
        name = f"{seed}-{number}-{i}"
        (kind,) = random.Random(name).choices(kinds, weights)
        folder = scratch / "input"
        shutil.rmtree(folder, ignore_errors=True)
        KINDS[kind][0](_fresh(folder), random.Random(name))
        told.put((number, kind, name, None))
        if (wrong := attempt(kind, folder)) is not None:
            kept = found / f"{kind}-{name}"
            shutil.rmtree(kept, ignore_errors=True)
            KINDS[kind][0](_fresh(kept), random.Random(name))  # as it was before it was used
            (kept / NOTE).write_text(wrong)
            told.put((number, kind, name, wrong))
        if time.monotonic() > until:
            break
    told.put((number, None, None, None))
    shutil.rmtree(scratch, ignore_errors=True)


def _unwatched_first(kinds: list[str], scratch: Path) -> None:
    """What the first use of each kind imports and caches is nobody's fault, nor how long a plan measures a machine."""
    from jprune.pipeline.forecast import speed

    speed.measure = functools.cache(speed.measure)
    _model(_fresh(scratch / "warm"))
    _command("prune", "magnitude", scratch / "warm", "--sparsity", "0.5", "--plan")
    shutil.rmtree(scratch / "warm")
    for kind in kinds:
        folder = _fresh(scratch / "warm")
        KINDS[kind][0](folder, random.Random(0))
        attempt(kind, folder)
        shutil.rmtree(folder)


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _raise(*_: object) -> None:
    raise _TooLong


def again(folder: Path) -> Iterator[tuple[str, str]]:
    """Uses inputs that were found before, each in a copy; gives those that are still wrong."""
    signal.signal(signal.SIGALRM, _raise)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"XDG_CACHE_HOME": str(Path(scratch) / "cache"), "HF_HUB_OFFLINE": "1"}
        for path in sorted(folder.iterdir()):
            copy = Path(scratch) / path.name
            shutil.copytree(path, copy, ignore=shutil.ignore_patterns(NOTE))
            if (wrong := attempt(path.name.split("-")[0], copy)) is not None:
                yield path.name, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--inputs", type=int, default=10**9)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--found", type=Path, default=Path("found"))
    parser.add_argument("--again", type=Path)
    options = parser.parse_args()
    if options.again:
        wrong = list(again(options.again))
        print(f"{len(wrong)} of {len(list(options.again.iterdir()))} inputs are still wrong", *wrong, sep="\n")
        return bool(wrong)
    return hunt(options)


def hunt(options: argparse.Namespace) -> int:
    """Starts the processes, counts what they tell, and starts those anew that die."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    start = time.monotonic()
    until = start + 60 * options.minutes
    each = -(-options.inputs // options.processes)
    used, wrong, last = Counter(), Counter(), {}
    running = {}

    def begin(number: int) -> None:
        words = (number, options.kinds.split(","), options.seed, until, each, options.found, told)
        running[number] = context.Process(target=work, args=words, daemon=True)
        running[number].start()

    for number in range(options.processes):
        begin(number)
    while running:
        with contextlib.suppress(Exception):
            number, kind, name, finding = told.get(timeout=1)
            if kind is None:
                running.pop(number).join()
            elif finding is None:
                used[kind] += 1
                last[number] = (kind, name)
            else:
                wrong[kind] += 1
                print(f"{kind} {name}: {finding.strip().splitlines()[-1][:200]}", flush=True)
            continue
        for number, process in list(running.items()):
            if not process.is_alive():
                kind, name = last.get(number, ("nothing", ""))
                wrong[kind] += 1
                print(f"{kind} {name}: the process died ({process.exitcode})", flush=True)
                running.pop(number)
    print(json.dumps({"inputs": used, "findings": wrong, "minutes": round((time.monotonic() - start) / 60, 2)}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
