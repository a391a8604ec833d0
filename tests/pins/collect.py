"""Collects what the pins compare, in a process of its own: one CPU device, no checks of shapes, nothing patched.

    python tests/pins/collect.py found.json  # what the code does now
    python tests/pins/collect.py --update    # revises the snapshots by that, and the bits where they are recorded
    python tests/pins/collect.py --record    # records the bits of this environment too, with optimisations and without

It uses what users use, and nothing else of jprune: the command line, the public names, and files. Weights and tokens
are made of integers by NumPy, so that they are the same bits everywhere.
"""

import argparse
import ast
import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import Any

from revising import revised
from typed import CALLS, HELP_OF_PARTS, RUNS, SAYS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WITHOUT_OPTIMISATIONS = """--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
    --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"""
"""As the tests run: programs compile in half the time, and give the same bits with the last three flags or without."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

DATA = {"versions"}
"""Keys of JSON objects whose own keys are data, whatever they look like; elsewhere such keys are told by their look."""


def environment() -> dict[str, Any]:
    """What bits depend on, as far as it is known."""
    flags = sorted(f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f)
    packages = ("jax", "jaxlib", "numpy", "scipy", "optax", "flax")
    return {
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "processor": _processor(),
        "xla_flags": flags,
        "devices": 1,
    }


def _processor() -> str:
    """Maker, family and widest vectors of the processor, which decide how sums are split up."""
    try:
        lines = dict(
            (part.strip() for part in line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        features = lines["flags"].split()
        widest = next((f for f in ("avx512_bf16", "avx512f", "avx2", "avx") if f in features), "none")
        return f"{lines['vendor_id']} {lines['cpu family']} {widest}"
    except (OSError, KeyError):
        return f"{platform.system()} {platform.machine()}"


def make_inputs(here: Path) -> dict[str, str]:
    """Writes a model and tokens; gives their paths by name."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        """Evenly distributed, of variance 3 / inputs; multiples of a power of two, so exact in float32."""
        scale = 2.0 ** -round(np.log2(shape[-1] ** 0.5 * 2**20 / 3))
        return (rng.integers(-(2**20), 2**20, shape) * scale).astype(np.float32)

    d, ff, kv, vocab = 32, 32, 16, CONFIG["vocab_size"]
    tensors = {"model.embed_tokens.weight": weight(vocab, d), "lm_head.weight": weight(vocab, d)}
    tensors["model.norm.weight"] = 1 + weight(d) / 8
    for i in range(3):
        shapes = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        shapes |= {
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (ff, d),
            "mlp.up_proj": (ff, d),
            "mlp.down_proj": (d, ff),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = weight(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = 1 + weight(d) / 8
    for name in ("model", "no_tokenizer", "empty"):
        (here / name).mkdir()
    for name in ("model", "no_tokenizer"):
        save_file(tensors, here / name / "model.safetensors", metadata={"format": "pt"})
        (here / name / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(here / "model" / "tokenizer.json"))
    for name, n, length in (("tokens", 6, 24), ("held_out", 2, 12), ("rows", 12, 12), ("other_rows", 12, 12)):
        np.save(here / f"{name}.npy", rng.integers(0, vocab, (n, length), dtype=np.int32))
    folders = {name: str(here / name) for name in ("model", "no_tokenizer", "empty", "missing")}
    files = {name: str(here / f"{name}.npy") for name in ("tokens", "held_out", "rows", "other_rows")}
    return {"here": str(here), **folders, **files}


class Shell:
    """Types commands, with names of files in braces."""

    def __init__(self, names: dict[str, str]):
        from jprune.cli.main import main

        self.main = main
        self.times = "PINS_TIMES" in os.environ
        self.names = names

    def words(self, line: str) -> list[str]:
        import shlex

        return [re.sub(r"\{([^}]+)\}", lambda found: self.names[found[1]], word) for word in shlex.split(line)]

    def __call__(self, line: str, *more: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        start = time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = self.main([*self.words(line), *more])
            except SystemExit as end:
                status = end.code
        if self.times:
            print(f"{time.process_time() - start:6.1f} s  jprune {line}", file=sys.stderr, flush=True)
        told = tuple(each.buffer.getvalue().decode() for each in (out, err))
        return status, *told

    def json(self, line: str, *more: str) -> Any:
        """What a command that must succeed prints with --json."""
        status, out, err = self(line, *more, "--json")
        if status != 0:
            raise RuntimeError(f"jprune {line}: exit status {status}\n{err}")
        return json.loads(out.splitlines()[-1])


def commands(overview: str) -> list[str]:
    """The commands that an overview lists."""
    return re.findall(r"^  (\S+(?: \S+)*?)  +\S", overview, re.MULTILINE)


def parse_help(text: str) -> dict[str, Any]:
    """Flags, what they take, and their defaults; no prose.

    In a box each entry begins at the margin with how it is typed, and its text is indented, on the same line or on the
    next ones.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    entries: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if found := re.match(r"╭─ (.+?) ─*╮$", line.strip()):
            title = found[1]
            entries[title] = []
        elif line.startswith("│"):
            inside = line.strip().removeprefix("│ ").removesuffix("│").rstrip()
            if not inside.startswith(" "):
                entries[title].append(re.split(r" {2,}", inside, maxsplit=1))
            else:
                entries[title][-1].append(inside.strip())
    usage = text.splitlines()[0].split(" [-h]")[0]
    # In the order of the alphabet: how a help is laid out may change.
    return {
        "usage": usage,
        **{title: sorted((_entry(*parts) for parts in found), key=lambda e: e[0]) for title, found in entries.items()},
    }


def _entry(typed: str, *text: str) -> list[str | None]:
    """[flags and what they take, default]."""
    marks = re.findall(r"\((?:default: .*|required.*|repeatable.*|unset.*|fixed.*)\)$", " ".join(text))
    return [typed, re.sub(r"^\(.*\((?=default: )", "(", marks[0]) if marks else None]


def collect_help(shell: Shell) -> dict[str, Any]:
    """Of every command, what its help says of flags; of every overview, the commands in it."""
    overviews = {}
    for line in ("--help", "prune --help", "tune --help", "eval --help"):
        status, out, _ = shell(line)
        overviews[f"jprune {line}"] = {"status": status, "commands": commands(out)}
    found = {}
    parts = {f"prune prune-and-tune {words}": "prune prune-and-tune" for words in HELP_OF_PARTS}
    for line in [*overviews["jprune --help"]["commands"], *parts]:
        status, out, err = shell(f"{line} --help")
        found[f"jprune {line}"] = {"status": status, "stderr": bool(err), **parse_help(out)}
    return {"overviews": overviews, "commands": found}


def schema(value: Any, *, data: bool = False) -> Any:
    """The shape of a JSON value: keys and types; of lists, and of objects with data as keys, the shapes there are."""
    if isinstance(value, dict):
        if data or any(re.search(r"[/ ]|\.\w", key) for key in value):
            return {"*": _distinct(value.values())}
        return {key: schema(each, data=key in DATA) for key, each in value.items()}
    if isinstance(value, list):
        return _distinct(value)
    return {type(None): "null", bool: "bool", int: "int", float: "float", str: "str"}[type(value)]


def _distinct(values: Any) -> list[Any]:
    """Ordered by how they look, not by where they are."""
    seen = {json.dumps(found): found for found in map(schema, values)}
    return [seen[key] for key in sorted(seen)]


def look_at(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a command wrote: its structure, and a digest of every tensor."""
    import numpy as np
    from safetensors import safe_open

    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    tensors, digests = {}, {}
    for name in (f for f in files if f.endswith(".safetensors")):
        with safe_open(folder / name, "numpy") as file:
            for key in sorted(file.keys()):
                array = np.ascontiguousarray(file.get_tensor(key))
                what = f"{name}: {key}" if name != "model.safetensors" else key
                zeros = int(array.size - np.count_nonzero(array))
                tensors[what] = f"{array.dtype.name}{list(array.shape)}, {zeros} zeros"
                digests[what] = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    structure: dict[str, Any] = {"files": _without_orbax(files), "tensors": tensors}
    for name in (f for f in files if Path(f).name in ("config.json", "adapter_config.json")):
        text = (folder / name).read_text(encoding="utf-8").replace(str(folder.parent), "HERE")
        structure[name] = json.loads(text)
        structure[f"{name}, digest"] = hashlib.sha256(text.encode()).hexdigest()
        if name == "config.json":  # only what is different
            structure[name] = {
                key: structure[name].get(key, "(gone)")
                for key in sorted({*structure[name], *CONFIG})
                if structure[name].get(key) != CONFIG.get(key)
            }
    return structure, digests


def _without_orbax(files: list[str]) -> list[str]:
    """Orbax names its files by digests, so they are counted as one."""
    return sorted({re.sub(r"/(d|ocdbt\.process_\w+)/.*", "/...", f) for f in files})


def collect_runs(shell: Shell, here: Path) -> dict[str, Any]:
    """Types the commands of RUNS and SAYS."""
    found: dict[str, Any] = {"keys": {}, "structure": {}, "bits": {}}
    for name, line in RUNS.items():
        out = here / name.replace(" ", "_").replace(",", "")
        shell.names[name.replace(" ", "_")] = str(out)
        told = shell.json(line, "--out", str(out))
        record = json.loads((out / "jprune.json").read_text())
        metrics = {
            str(path.relative_to(out)): schema(list(map(json.loads, path.read_text().splitlines())))
            for path in sorted(out.rglob("*.jsonl"))
        }
        found["keys"][name] = {"--json": schema(told), "jprune.json": schema(record), **metrics}
        structure, found["bits"][name] = look_at(out)
        beside = sorted(p.name.replace(out.name, "OUT") for p in here.glob(f"{out.name}.*"))
        recipe = json.loads(json.dumps(record.get("recipe")).replace(str(here), "HERE"))
        found["structure"][name] = {"recipe": recipe, "beside": beside, **structure}
    for name, line in SAYS.items():
        told = shell.json(line)
        found["keys"][name] = {"--json": schema(told)}
        if name in ("eval perplexity", "generate"):
            key = "perplexity" if name == "eval perplexity" else "text"
            found["bits"][name] = {key: repr(told[key])}
    return found


def collect_statuses(shell: Shell) -> dict[str, Any]:
    """Exit status of every call, whether stdout is empty, and whether stderr is one line of jprune's, or what else."""
    found = {}
    for line in CALLS:
        status, out, err = shell(line)
        ours = re.fullmatch(r"jprune: .+\n", err) is not None
        found[f"jprune {line}".strip()] = {
            "status": status,
            "stdout": "text" if out else "empty",
            "stderr": "one line" if ours else "text" if err else "empty",
        }
    return found


def exported(path: Path) -> list[str]:
    """The names that a package's __init__ offers: those that it imports as themselves, or has in __all__."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]:
            names |= set(ast.literal_eval(node.value))
    return sorted(names)


def collect_names() -> dict[str, Any]:
    """Every public name of jprune; of functions and classes how they are called, of modules what is in them."""
    import jprune

    found = {}
    for name in exported(Path(jprune.__file__)):
        value = getattr(jprune, name)
        found[name] = describe(value)
        if inspect.ismodule(value):
            offered = exported(Path(value.__file__))
            for inner, each in vars(value).items():
                own = inner in offered or getattr(each, "__module__", None) == value.__name__
                if own and not inner.startswith("_") and callable(each) and typing.get_origin(each) is None:
                    found[f"{name}.{inner}"] = describe(each)
    return dict(sorted(found.items()))


def describe(value: Any) -> Any:
    """How a function or class is called and what the class has; of anything else its type."""
    if inspect.isclass(value):
        what: dict[str, Any] = {}
        if value.__init__ is not object.__init__ and not issubclass(value, Exception):
            what["call"] = signature(value)
        fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        for name in sorted(n for n in dir(value) if not n.startswith("_") and n not in fields):
            home = next((c for c in value.__mro__ if name in vars(c)), object)
            if not home.__module__.startswith("jprune"):
                continue
            member = inspect.getattr_static(value, name)
            member = getattr(member, "__func__", member)
            what[name] = signature(member) if inspect.isfunction(member) else type(member).__name__
        if fields:
            what["fields"] = sorted(fields)
        return {"class": what, "error": True} if issubclass(value, Exception) else {"class": what}
    if callable(value):
        return signature(value)
    return type(value).__name__


def signature(function: Any) -> list[str]:
    """Parameters with their kind and default; no annotations, which say where types live."""
    marks = {"POSITIONAL_ONLY": " /", "KEYWORD_ONLY": " (keyword)", "VAR_POSITIONAL": " *", "VAR_KEYWORD": " **"}

    def shown(default: Any) -> str:
        return default.__name__ if hasattr(default, "__name__") else repr(default)

    found = [
        p.name + marks.get(p.kind.name, "") + ("" if p.default is p.empty else f" = {shown(p.default)}")
        for p in inspect.signature(function).parameters.values()
    ]
    return sorted(found, key=lambda each: each if " (keyword)" in each else "")  # the order of keywords is nobody's


def collect_python(names: dict[str, str], here: Path) -> dict[str, Any]:
    """What the public functions take by keyword and give back; whether `prune_model` writes what the command does."""
    import jprune

    options = {"method": jprune.Wanda(), "pattern": jprune.NM(2, 4), "calibration": names["tokens"], "memory": None}
    options |= {"samples": None, "sequence_length": None, "seed": 0, "where": (), "skip": (), "overrides": {}}
    options |= {"dtype": None, "expert_tokens": 128, "keep_zeros": False, "mesh": None}
    wanted: dict[str, Any] = {"format": "hf", "evaluate": None, "overwrite": False, "resume": False, "run": None}
    model, out = names["model"], str(here / "python")
    report = jprune.prune_model(model, out, **options, **wanted, progress=lambda step: None)
    plan = jprune.plan_run(model, out=".", **options)
    try:
        jprune.plan_run(model, **options, nonsense=1)
        refused = None
    except Exception as error:
        refused = next(kind.__name__ for kind in (TypeError, type(error)) if isinstance(error, kind))
    checkpoint = jprune.load(names["model"])
    _, digests = look_at(here / "python")
    return {
        "Report": sorted(field.name for field in dataclasses.fields(report)),
        "Report.json": schema(json.loads(json.dumps(report.json()))),
        "Plan": sorted(field.name for field in dataclasses.fields(plan)),
        "Checkpoint": describe(type(checkpoint)),
        "an unknown keyword is a": refused,
        "as on the command line": digests == look_at(Path(names["wanda_2:4"]))[1],
    }


def collect() -> dict[str, Any]:
    """All parts."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary).resolve()
        os.environ |= {"XDG_CACHE_HOME": str(here / "cache"), "HF_HOME": str(here / "hub"), "HF_HUB_OFFLINE": "1"}
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "200", "NO_COLOR": "1"}
        names = make_inputs(here)
        shell = Shell(names)
        return {
            "environment": environment(),
            "help": collect_help(shell),
            **collect_runs(shell, here),
            "statuses": collect_statuses(shell),
            "names": collect_names(),
            "python": collect_python(names, here),
        }


SNAPSHOTS = ("help", "keys", "structure", "statuses", "names", "python")


def snapshot(name: str) -> Path:
    """The file of a part that is the same everywhere."""
    return HERE / "snapshots" / f"{name}.json"


def recorded_bits() -> list[tuple[Path, dict[str, Any]]]:
    """The files of bits, each with the environment that it was recorded in."""
    return [(path, json.loads(path.read_text())) for path in sorted((HERE / "snapshots").glob("bits-*.json"))]


def in_fresh_process(**variables: str) -> dict[str, Any]:
    """`collect` in a process of its own, of this working tree."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        subprocess.run(
            [sys.executable, __file__, path],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **variables},
            check=True,
        )
        return json.loads(path.read_text())


def update(found: dict[str, Any], *, record: bool) -> None:
    """Revises the snapshots by what was found; and the bits of its environment, if they are known or to be recorded."""
    for name in SNAPSHOTS:
        known = json.loads(snapshot(name).read_text(encoding="utf-8"))
        _write(snapshot(name), revised(name, known, found[name]))
    here = found["environment"]
    flags = "without optimisations" if here["xla_flags"] else ""
    name = re.sub(r"[^\w.]+", "-", f"jax {here['packages']['jax']} {here['processor']} {flags}")
    path = next((p for p, known in recorded_bits() if known["environment"] == here), None)
    if path or record:
        path = path or HERE / "snapshots" / f"bits-{name.strip('-')}.json"
        _write(path, {"environment": here, "bits": found["bits"]})
    else:
        print(f"no bits are recorded for {name.strip('-')}; --record records them")


def _write(path: Path, contents: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    gc.set_threshold(100_000, 20, 100)  # what is traced stays, and looking through it takes long
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("out", nargs="?", type=Path)
    options = parser.parse_args()
    if (options.update or options.record) == (options.out is not None):
        parser.error("give either a file for what is found, or --update or --record")
    if options.out is None:
        for xla_flags in ("", " ".join(WITHOUT_OPTIMISATIONS.split())):
            update(in_fresh_process(XLA_FLAGS=xla_flags), record=options.record)
    else:
        _write(options.out, collect())
