"""What users can see stays as it is: flags, keys of JSON, public names, exit statuses, and what every command writes.

Prose is free: of a help text only the flags, what they take and their defaults are compared. Bits are compared where
they were recorded for the same packages, kind of processor and flags of XLA; everything else is compared always.

Where a change is meant, `python tests/pins/collect.py --update` revises the snapshots, and the diff is what to review.
Public names that are to be pinned are added to names.json and python.json by hand.
"""

import json

import collect
import pytest
from comparing import KNOWN, differences, same, same_bits, same_keys, same_structure
from revising import revised, without_new
from typed import ELSEWHERE, RUNS, SAYS


def test_commands(found):
    same(KNOWN["help"]["overviews"], found["help"]["overviews"])


@pytest.mark.parametrize("command", KNOWN["help"]["commands"])
def test_flags(found, command):
    same(KNOWN["help"]["commands"][command], found["help"]["commands"].get(command))


def test_every_command_is_pinned(found):
    commands = found["help"]["overviews"]["jprune --help"]["commands"]
    assert {f"jprune {name}" for name in commands} <= set(found["help"]["commands"])
    typed = [*RUNS.values(), *SAYS.values()]
    planned = [line for line in typed if line.endswith("--plan")]
    for name in sorted(set(commands) - set(ELSEWHERE)):
        assert any(line.startswith(f"{name} ") for line in typed), f"no run of `jprune {name}` is pinned"
        flags = dict(found["help"]["commands"][f"jprune {name}"]["options"])
        if "--plan" in flags:
            assert any(line.startswith(f"{name} ") for line in planned), f"no plan of `jprune {name}` is pinned"


@pytest.mark.parametrize("name", KNOWN["keys"])
def test_keys_of_json(found, name):
    same_keys(found, name)


@pytest.mark.parametrize("name", RUNS)
def test_structure(found, name):
    same_structure(found, name)


@pytest.mark.parametrize("name", [*RUNS, "eval perplexity", "generate"])
def test_bits(found, name):
    same_bits(found, name)


def test_every_run_has_a_snapshot():
    assert list(KNOWN["keys"]) == [*RUNS, *SAYS]
    assert list(KNOWN["structure"]) == list(RUNS)


def test_exit_statuses(found):
    same(KNOWN["statuses"], found["statuses"])


@pytest.mark.parametrize("name", KNOWN["names"])
def test_public_names(found, name):
    same(KNOWN["names"][name], without_new(KNOWN["names"][name], found["names"].get(name)))


@pytest.mark.parametrize("what", KNOWN["python"])
def test_functions_of_python(found, what):
    same(KNOWN["python"][what], without_new(KNOWN["python"][what], found["python"].get(what)))


def test_help_is_read_without_its_prose():
    """Of a help text as tyro draws it, where prose has brackets, breaks lines, and looks like flags."""
    text = (
        "usage: jprune x [-h] [OPTIONS] STR\n\nProse.\n\n"
        "╭─ options ──────────────────────────────╮\n"
        "│ -h, --help     show this (default: no) │\n"
        "│ --per {None,output}                    │\n"
        "│                Of a --kernel (as in    │\n"
        "│                it). (default:          │\n"
        "│                a (b))                  │\n"
        "│ --plan         Touch nothing           │\n"
        "╰────────────────────────────────────────╯\n"
    )
    assert collect.parse_help(text) == {
        "usage": "usage: jprune x",
        "options": [["--per {None,output}", "(default: a (b))"], ["--plan", None], ["-h, --help", "(default: no)"]],
    }


def test_differences_are_told():
    known = {"a": [1, {"b": "int"}], "c": 2, "d": 1}
    assert differences(known, {"a": [1, {"b": "int"}], "c": 2, "d": 1}) == []
    assert differences(known, {"a": [1, {"b": "str"}], "c": 2.0, "e": 1}) == [
        "/d: is gone",
        "/e: is new: 1",
        "/a[1]/b: was 'int', is 'str'",
        "/c: was 2, is 2.0",
    ]
    assert differences({"a": 1, "b": [[1], [2]]}, {"b": [[2]], "a": 1}) == ["/b: is gone: [1]"]


def test_an_update_changes_what_has_changed():
    """Neither the order in which keys were, nor what is pinned of names."""
    known = {"b": {"y": 1, "x": [{"n": 1, "m": 2}]}, "gone": 0, "a": 3}
    now = {"new": 4, "a": 3, "after a": 5, "b": {"x": [{"m": 2, "n": 7}], "y": 1}}
    expected = {"new": 4, "b": {"y": 1, "x": [{"n": 7, "m": 2}]}, "a": 3, "after a": 5}
    assert json.dumps(revised("help", known, now)) == json.dumps(expected)
    chosen = {"b": expected["b"], "a": 3}
    assert json.dumps(revised("names", known, now)) == json.dumps(chosen)
