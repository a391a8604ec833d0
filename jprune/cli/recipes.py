"""Recipe files: the options of a run in TOML or JSON, or the record of an earlier run (jprune.json).

    method = "sparsegpt"
    sparsity = 0.5
    skip = ["blocks/0/"]

    [overrides]
    "mlp/down" = "2:4"

Keys are the command line's options with underscores, or their names in Python; a table stands for an option of the form
NAME=VALUE, such as the domains of --data. What stands on the command line counts more.
"""

import difflib
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from jprune import paths, texts
from jprune.cli.flags import Flag, Form
from jprune.errors import JpruneError, UsageError

_PATTERN = ("sparsity", "pattern", "per")
"""Options of which some exclude each other, so that one on the command line replaces all in the file."""
_NOT_IN_FILES = ("model", "recipe")
_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "text"}


def read(path: Path) -> dict[str, Any]:
    """The options in a file, by the names that stand there; those that are null or empty are left out.

    Raises:
      JpruneError: the file cannot be read.
    """
    try:
        text = texts.decoded(paths.given(path).read_bytes(), f"--recipe {path}")
        content = texts.parsed(text)[0] if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise JpruneError(f"--recipe {path} cannot be read: {error.strerror}") from error
    except JpruneError:
        raise
    except (ValueError, RecursionError) as error:
        raise JpruneError(
            f"--recipe {path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}"
        ) from error
    recipe = content.get("recipe", content) if isinstance(content, dict) else None
    if not isinstance(recipe, dict):
        raise JpruneError(f"--recipe {path}: expected an object with the options of a run")
    if isinstance(pattern := recipe.get("pattern"), Mapping):  # as the record of a run has it
        recipe = {**recipe, "pattern": None, **pattern}
    return {key: value for key, value in recipe.items() if value not in (None, [], {})}


def values(
    recipe: Mapping[str, Any], path: Path, name: str, form: Form, given: set[str], where: Callable[[str], str | None]
) -> dict[str, Any]:
    """What a recipe says of the options of a command, by the flags' names.

    Args:
      recipe: the options in the file.
      path: of the file.
      name: of the command.
      form: the flags of the command.
      given: the names of the flags that are on the command line, which count more.
      where: the command that has an option, if this one has not.

    Raises:
      JpruneError: the recipe is for another method, or has a key or a value that is not of this command's options.
    """
    method = name.split()[-1]
    if recipe.get("method", method) != method:
        raise JpruneError(f"{path} is a recipe for {recipe['method']!r}, and not for {method!r}: use that command")
    left_out = given | set(_PATTERN) if given & {"sparsity", "pattern"} else given
    found = {}
    for key, value in recipe.items():
        if key == "method":
            continue
        flag = form.find(key) if key not in _NOT_IN_FILES else None
        if flag is None:
            raise UsageError(f"{path}: {_unknown(key, name, form, where)}")
        if flag.name not in left_out:
            found[flag.name] = _value(flag, value, path, key)
    return found


def _unknown(key: str, name: str, form: Form, where: Callable[[str], str | None]) -> str:
    if key in _NOT_IN_FILES:
        return f"key {key!r} stands on the command line only"
    known = sorted({n for flag in form.flags.values() for n in (flag.name, flag.field)} - set(_NOT_IN_FILES))
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"unknown key {key!r}; did you mean {near[0]!r}?"
    if (other := where(key)) is not None:
        return f"key {key!r} is an option of `jprune {other}`, and not of `jprune {name}`"
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")


def _value(flag: Flag, value: Any, path: Path, key: str) -> Any:
    """The value of the field, checked by its type, or made as from words."""
    try:
        if flag.word.made is not None:
            return flag.word.made(f"key {key!r}:", value)
        return _checked(value, flag.type)
    except TypeError as error:
        raise UsageError(f"{path}: key {key!r} must be {error}; got {value!r}") from None
    except JpruneError as error:
        raise type(error)(f"{path}: {error}") from None


def _checked(value: Any, kind: Any) -> Any:
    """A value that is of a type, or becomes it without loss; a TypeError otherwise says what it must be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _checked(value, args[0])
    if origin in (Union, types.UnionType):
        (kind,) = (each for each in args if each is not type(None))  # options are of one type, or none
        return _checked(value, kind)
    if origin is Literal:
        if value in args:
            return value
        raise TypeError(f"one of {', '.join(map(str, args))}")
    if origin is tuple and isinstance(value, str | list):
        return tuple(_checked(each, args[0]) for each in ([value] if isinstance(value, str) else value))
    return _plain(value, kind)


def _plain(value: Any, kind: type) -> Any:
    number = isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and number:
        return float(value)
    if type(value) is kind:
        return value
    raise TypeError(_NAMES.get(kind, "a list"))
