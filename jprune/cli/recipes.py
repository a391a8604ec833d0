"""Recipe files: the options of a run in TOML or JSON, or the record of an earlier run (jprune.json).

    method = "sparsegpt"
    sparsity = 0.5
    skip = ["blocks/0/"]

    [overrides]
    "mlp/down" = "2:4"

Keys are the command line's options with underscores; a table stands for an option of the form NAME=VALUE, such as the
domains of --data. What stands on the command line counts more.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jprune.errors import JpruneError

_EITHER = ("--sparsity", "--pattern")


def as_words(path: Path, method: str, given: Sequence[str]) -> list[str]:
    """The words of the command line that a recipe stands for, less those that `given` replaces.

    Raises:
      JpruneError: the file cannot be read, or is for another method.
    """
    recipe = _read(path)
    if recipe.get("method", method) != method:
        raise JpruneError(f"{path} is a recipe for {recipe['method']!r}, and not for {method!r}: use that command")
    named = {word.split("=")[0] for word in given if word.startswith("--")}
    if named & set(_EITHER):
        named |= {*_EITHER, "--per"}
    words: list[str] = []
    for key, value in recipe.items():
        flag = f"--{key.replace('_', '-')}"
        if key == "method" or value is None:
            continue
        if key == "pattern" and isinstance(value, Mapping):  # as the record of a run has it
            entries = [(f"--{name}", v) for name, v in value.items() if v is not None]
        elif key == "overrides":
            entries = [("--override", f"{regex}={_pattern(pattern)}") for regex, pattern in value.items()]
        elif isinstance(value, Mapping):
            entries = [(flag, f"{name}={item}") for name, item in value.items()]
        elif isinstance(value, list):
            entries = [(flag, item) for item in value]
        elif isinstance(value, bool):
            words += [flag] if value and flag not in named else []
            continue
        else:
            entries = [(flag, value)]
        words += [word for flag, v in entries if flag not in named for word in (flag, str(v))]
    return words


def _pattern(value: Any) -> str:
    return str(value["sparsity"]) if isinstance(value, Mapping) else str(value)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise JpruneError(f"--recipe {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise JpruneError(
            f"--recipe {path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise JpruneError(f"--recipe {path}: expected an object with the options of a run")
    return content.get("recipe", content)
