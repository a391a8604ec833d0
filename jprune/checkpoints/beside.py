"""The files beside a model's weights: tokenizer, generation config, licence, and config.json as it is written.

What a result refers to must lie in it. `auto_map` names Python files of the model's authors, which jprune never runs.
Those of a tokenizer travel with it; those of the model do not, and their keys are left out: transformers has the
architecture itself, and the result is written for that.
"""

import fnmatch
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune import texts
from jprune.checkpoints import writing
from jprune.checkpoints.inside import checked
from jprune.checkpoints.model import Model
from jprune.models import families

PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What travels with the weights: tokenizer, generation, licence (which its terms usually ask for)."""
CODE = "tokenization*.py"
"""The names that code of tokenizers has."""
_PICKLED = (".bin", ".pickle", ".pkl", ".pt", ".pth")
_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+))", re.MULTILINE)
_MAP = "auto_map"
# Of config.json: where the weights of the source lie.
_OF_THE_SOURCE = ("transformers_weights",)
_EMPTY = ("quantization_config", "compression_config")


def read(folder: Path) -> dict[str, bytes]:
    """Tokenizer, generation config and licence of a folder.

    Raises:
        JpruneError: one of them is a link out of the folder.
    """
    files = {
        path.name: checked(path, folder).read_bytes()
        for path in sorted(folder.iterdir())
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in PATTERNS)
        and path.suffix not in _PICKLED
        and checked(path, folder).is_file()
    }
    code: dict[str, bytes] = {}
    auto_map = texts.beside(files, "tokenizer_config.json").get(_MAP)
    values = auto_map.values() if isinstance(auto_map, Mapping) else ()
    named = [file for value in values for name in _names(value) if (file := _file(name))]
    while named:
        path = folder / named.pop()
        if path.name not in code and path.is_file():
            code[path.name] = checked(path, folder).read_bytes()
            found = _IMPORT.findall(code[path.name].decode("utf-8", "replace"))
            named += [f"{one or other}.py" for one, other in found]
    return files | code


def write(folder: Path, checkpoint: Model, dtypes: Mapping[str, np.dtype]) -> None:
    """Writes config.json, with the dtype that most parameters have, and everything that travels with the model."""
    counts: dict[str, int] = {}
    for path, leaf in checkpoint.shapes.items():
        counts[dtypes[path].name] = counts.get(dtypes[path].name, 0) + leaf.size
    files = checkpoint.side_files
    config = _config(checkpoint.hf_config, files)
    # transformers 5 writes the first, everything reads the second.
    config["dtype" if "dtype" in config else "torch_dtype"] = max(counts, key=lambda name: counts[name])
    writing.write_json(folder / "config.json", config)
    for name, content in files.items():
        (folder / name).write_bytes(_tokenizer_config(files) if name == "tokenizer_config.json" else content)


def _config(config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """config.json without what refers to files that are not there."""
    left = {key: value for key, value in config.items() if key not in _OF_THE_SOURCE}
    left = {key: value for key, value in left.items() if value or key not in _EMPTY}
    if _MAP not in left:
        return left
    if kept := _present(left.pop(_MAP), files):
        left[_MAP] = kept
    if "AutoConfig" not in kept:  # transformers' own class reads it now, which it finds by its name
        known = families.ARCHITECTURES.get(str((config.get("architectures") or [None])[0]))
        if known is not None:
            left["model_type"] = known.model_type
    return left


def _tokenizer_config(files: Mapping[str, bytes]) -> bytes:
    """tokenizer_config.json, its own bytes where everything it refers to is there."""
    content = texts.beside(files, "tokenizer_config.json")
    kept = _present(content.get(_MAP), files)
    if kept == (content.get(_MAP) or {}):
        return files["tokenizer_config.json"]
    left = {key: value for key, value in content.items() if key != _MAP} | ({_MAP: kept} if kept else {})
    return (json.dumps(left, indent=2) + "\n").encode()


def _present(auto_map: Any, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The entries of an `auto_map` whose files are there, or which refer to a tokenizer's code on the hub."""
    if not isinstance(auto_map, Mapping):
        return {}

    def there(key: str, value: Any) -> bool:
        names = _names(value)
        return bool(names) and all(_file(n) in files or ("--" in n and key == "AutoTokenizer") for n in names)

    return {key: value for key, value in auto_map.items() if there(key, value)}


def _names(value: Any) -> list[str]:
    """The classes that an `auto_map` has under a key: one, or several, of which some may be null."""
    return [str(name) for name in (value if isinstance(value, list) else [value]) if name is not None]


def _file(name: str) -> str | None:
    """The file in its own folder that a class lies in: "module.Class"."""
    return f"{name.split('.')[0]}.py" if re.fullmatch(r"\w+\.\w+", name) else None
