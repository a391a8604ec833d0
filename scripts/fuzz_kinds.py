"""The kinds of input of scripts/fuzz.py: each makes a folder with damaged files, and uses it as a command would."""

import contextlib
import json
import os
import random
import zlib
from collections.abc import Callable
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
    packed,
    parquet,
    safetensors,
    tensors,
    tokenizer,
)

Make = Callable[[Path, random.Random], None]
Use = Callable[[Path], None]


def refusals() -> tuple[type[BaseException], ...]:
    from jprune.errors import JpruneError

    return (JpruneError,)


def model(folder: Path, *, weights: bool = True) -> None:
    (folder / "config.json").write_bytes(as_json(LLAMA))
    if weights:
        (folder / "model.safetensors").write_bytes(safetensors(tensors()))


def make_safetensors(folder: Path, rng: random.Random) -> None:
    model(folder, weights=False)
    data = safetensors(tensors(), (lambda header: damaged_tree(header, rng)) if rng.random() < 0.7 else lambda h: h)
    (folder / "model.safetensors").write_bytes(damaged_bytes(data, rng) if rng.random() < 0.4 else data)


def make_index(folder: Path, rng: random.Random) -> None:
    model(folder, weights=False)
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
    model(folder, weights=False)
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
    model(folder)
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
    model(folder)
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


def make_packed(folder: Path, rng: random.Random) -> None:
    files = dict(packed())
    arrays = "packed-00001.safetensors"
    if rng.random() < 0.4:
        files["packed.json"] = damaged_json(json.loads(files["packed.json"]), rng)
    elif rng.random() < 0.3:
        files[arrays] = damaged_bytes(files[arrays], rng)
    else:  # values and places, where nothing but their own checks finds it
        data = np.frombuffer(files[arrays], np.uint8).copy()
        begin = 8 + int(data[:8].view(np.uint64)[0])
        data[[rng.randrange(begin, len(data)) for _ in range(rng.choice([1, 4, 64]))]] ^= 1 << rng.randrange(8)
        files[arrays] = data.tobytes()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def make_record(folder: Path, rng: random.Random) -> None:
    model(folder)
    (folder / "jprune.json").write_bytes(damaged_json(RECORD, rng))


def make_run(folder: Path, rng: random.Random) -> None:
    model(folder)
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


def use_packed(folder: Path) -> None:
    from jprune.checkpoints import load

    checkpoint = load(folder)
    for kept in (False, True):
        checkpoint.params(packed=kept)


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


def command(*words: object) -> None:
    from jprune.cli import main

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
    assert status in (0, 1, 2), status


def use_recipe(folder: Path) -> None:
    (recipe,) = folder.glob("recipe.*")
    command("prune", "magnitude", folder, "--recipe", recipe, "--plan")


def use_record(folder: Path) -> None:
    command("info", folder, "--json")
    command("prune", "magnitude", folder, "--recipe", folder / "jprune.json", "--plan")


def use_run(folder: Path) -> None:
    from jprune.runs.folder import RunFolder, finished

    finished(folder / "out.run", folder / "out")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with contextlib.suppress(*refusals()):
            run = RunFolder(folder / "out.run", out=folder / "out", fingerprint={"a": 1}, **options)
            run.marked("blocks/0")
            run.close()


KINDS: dict[str, tuple[Make, Use]] = {
    "safetensors": (make_safetensors, use_checkpoint),
    "index": (make_index, use_checkpoint),
    "config": (make_config, use_config),
    "gguf": (make_gguf, use_checkpoint),
    "packed": (make_packed, use_packed),
    "adapter": (make_adapter, use_checkpoint),
    "tokenizer": (make_tokenizer, use_tokenizer),
    "texts": (make_texts, use_texts),
    "recipe": (make_recipe, use_recipe),
    "record": (make_record, use_record),
    "run": (make_run, use_run),
}


COMMANDS = ("recipe", "record")
"""Kinds of which an input takes ten times as long, and comes seldom."""
