import json

import pytest

from jprune.checkpoints import record
from jprune.errors import JpruneError


def test_write_and_read(tmp_path):
    record.write(tmp_path, {"recipe": {"method": "wanda"}, "note": "é"})
    found = record.read(tmp_path)
    assert (found.pop("files"), type(found.pop("checksum"))) == ({}, int)
    assert found == {"format_version": 1, "recipe": {"method": "wanda"}, "note": "é"}


def test_what_an_editor_makes_of_it_and_names_that_are_no_text(tmp_path):
    source = "caf\udce9.txt"  # a file's name in Latin-1, as Python has it
    record.write(tmp_path, {"calibration": source, "note": "é"})
    path = tmp_path / "jprune.json"
    assert json.loads(path.read_bytes())["calibration"] == source
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps({"format_version": 1, "note": "é"}, indent=1), encoding=encoding, newline="\r\n")
        assert record.read(tmp_path)["note"] == "é"


def said(folder):
    try:
        return record.damaged(folder)
    except JpruneError as error:  # it is no JSON any more
        return [str(error)]


def test_every_flipped_bit_is_found_and_named(tmp_path):
    """Of each file a few, wherever they lie; of the record too, unless it is not JSON any more."""
    (tmp_path / "params").mkdir()
    names = ["model.safetensors", "params/data"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(range(256)))
    record.write(tmp_path, {"seconds": 1.5, 3: {10: "a", 9: "b"}, "sizes": (1, 2)})
    assert record.damaged(tmp_path) == []
    for name in [*names, "jprune.json"]:
        whole = (tmp_path / name).read_bytes()
        for at in range(0, len(whole), 17):
            (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            assert any(name in line for line in said(tmp_path)), at
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "params" / "data").unlink()
    assert record.damaged(tmp_path) == ["params/data is missing"]
    (tmp_path / "jprune.json").write_text('{"format_version": 1}')
    with pytest.raises(JpruneError, match="has no digests of files"):
        record.damaged(tmp_path)


def test_there_is_none(tmp_path):
    with pytest.raises(JpruneError, match=r"no jprune\.json there"):
        record.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 2}', "{}"])
def test_damaged_or_newer(tmp_path, content):
    (tmp_path / "jprune.json").write_text(content)
    with pytest.raises(JpruneError, match=r"jprune\.json"):
        record.read(tmp_path)
