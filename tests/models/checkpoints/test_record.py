import json

import pytest

from jprune.checkpoints import record
from jprune.errors import JpruneError


def test_write_and_read(tmp_path):
    record.write(tmp_path, {"recipe": {"method": "wanda"}, "note": "é"})
    assert record.read(tmp_path) == {"format_version": 1, "recipe": {"method": "wanda"}, "note": "é"}


def test_what_an_editor_makes_of_it_and_names_that_are_no_text(tmp_path):
    source = "caf\udce9.txt"  # a file's name in Latin-1, as Python has it
    record.write(tmp_path, {"calibration": source, "note": "é"})
    path = tmp_path / "jprune.json"
    assert json.loads(path.read_bytes())["calibration"] == source
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps({"format_version": 1, "note": "é"}, indent=1), encoding=encoding, newline="\r\n")
        assert record.read(tmp_path)["note"] == "é"


def test_there_is_none(tmp_path):
    with pytest.raises(JpruneError, match=r"no jprune\.json there"):
        record.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 2}', "{}"])
def test_damaged_or_newer(tmp_path, content):
    (tmp_path / "jprune.json").write_text(content)
    with pytest.raises(JpruneError, match=r"jprune\.json"):
        record.read(tmp_path)
