"""What a run depends on, as JSON by names that users understand, and whether that is still the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jprune.errors import JpruneError

NAME = "settings.json"
"""The file in a run's folder that says what it was begun with."""
_LONGEST = 60
"""Characters of a value that messages show."""


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file gives them back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(dict(settings)))


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The name of the first setting that two do not share and its two values, shortened; None if they are alike.

    What one of them lacks counts as None.
    """
    for name in {**one, **other}:
        if one.get(name) != other.get(name):
            return name, _short(one.get(name)), _short(other.get(name))
    return None


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `JpruneError` if a run was begun with other settings than those that it is to go on with.

    Args:
      folder: of the run, for the message.
      before: what the run was begun with, from its folder.
      now: what it is to go on with, by `as_json`.
    """
    if (difference := first_difference(before, now)) is not None:
        name, was, wanted = difference
        raise JpruneError(
            f"the run in {folder} was begun with {name} = {was} and cannot go on with {wanted}: the result would be "
            "that of neither; give what was given then, or begin anew with `overwrite`"
        )


def begin_or_resume(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Writes down what a run is begun with, or checks that one that is there may be gone on with.

    Args:
      folder: of the run; it is there.
      settings: what the result depends on; JSON.
      resume: whether a run that is there may be gone on with.

    Raises:
      JpruneError: a run is there and is not to be resumed, or has other settings (the first that differs is named).
    """
    known, settings = folder / NAME, as_json(settings)
    if known.exists():
        if not resume:
            raise JpruneError(
                f"{folder} holds a run that has not finished; go on with `resume`, or begin anew with `overwrite`"
            )
        check_same(folder, json.loads(known.read_text(encoding="utf-8")), settings)
    else:
        part = known.with_suffix(".part")
        part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        part.rename(known)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
