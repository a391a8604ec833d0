"""Paths as users give them."""

import os
import pathlib

import pytest

from jprune import paths
from jprune.data import sources
from jprune.errors import JpruneError


def test_homes_spaces_and_other_alphabets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "with space.txt", "ünï 你.txt", "caf\udce9.txt"):
        (tmp_path / name).write_text("text of " + name.encode("utf-8", "replace").decode())
        assert paths.given(f"~/{name}") == tmp_path / name
        assert sources.read(f"~/{name}", "calibration").text.startswith("text of ")
    monkeypatch.chdir(tmp_path)
    assert paths.given("a.txt") == pathlib.Path("a.txt")
    assert paths.given("./~x") == tmp_path / "~x"


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/x", "\ud83d", "a" * 5000])
def test_what_is_no_path(path):
    for read in (paths.given, paths.real, lambda path: sources.read(path, "calibration")):
        with pytest.raises(JpruneError, match=r"cannot be|no such home"):
            read(path)


def test_where_a_folder_really_is(tmp_path, monkeypatch):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/empty")
    (tmp_path / "new").symlink_to("disk/not-yet")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    assert paths.real("link") == tmp_path / "disk" / "empty"
    assert paths.real("new") == tmp_path / "disk" / "not-yet"
    assert paths.real(".") == tmp_path
    assert paths.real("disk/..") == tmp_path
    assert paths.real("disk/plain") == pathlib.Path("disk/plain")
    for path, said in (("loop", "leads nowhere"), (os.sep, "is the root")):
        with pytest.raises(JpruneError, match=said):
            paths.real(path)
