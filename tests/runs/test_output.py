"""The folder of a result: whole or absent, and nothing else of the user's is touched."""

import os

import pytest

from jprune.errors import JpruneError
from jprune.runs import output


def write(out, overwrite=False, source="model"):
    with output.new_folder(out, overwrite=overwrite, source=source) as folder:
        (folder / "jprune.json").write_text(f"{out}")


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_is_written(tmp_path, monkeypatch, there):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "empty").mkdir()
    (tmp_path / "link").symlink_to("disk/empty")
    for overwrite in (False, True):
        write(output.Path("link"), overwrite)
        assert tree(tmp_path) == ["disk", "disk/empty", "disk/empty/jprune.json", "link"]
        assert (tmp_path / "link").is_symlink()
    with pytest.raises(JpruneError, match="exists"):
        write(output.Path("link"))


@pytest.mark.parametrize("out", [".", "..", "../here", "/"])
def test_the_folder_one_is_in_is_not_replaced(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(JpruneError, match=r"the folder you are in|is the root"):
        write(output.Path(out), overwrite=True)
    assert tree(tmp_path) == ["here"]


def test_what_cannot_be_made_or_replaced_is_said_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(JpruneError, match="it is a file"):
        output.check(tmp_path / "file" / "out", overwrite=False, source="model")
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: True)
        with pytest.raises(JpruneError, match="disk of its own"):
            output.check(tmp_path / "out", overwrite=False, source="model")
    for locked, said in ((tmp_path, "nothing may be written there"), (tmp_path / "out", "is read-only")):
        monkeypatch.setattr(os, "access", lambda path, mode, locked=locked: path != locked)
        with pytest.raises(JpruneError, match=said):
            output.check(tmp_path / "out", overwrite=True, source="model")


def test_the_model_itself_by_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for source in ("~/model", str(tmp_path / "link")):
        for out in ("model", "link"):
            with pytest.raises(JpruneError, match="model itself"):
                write(tmp_path / out, overwrite=True, source=source)
