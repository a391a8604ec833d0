import pytest

from jprune.checkpoints import record
from jprune.errors import JpruneError


def test_write_and_read(tmp_path):
    record.write(tmp_path, {"recipe": {"method": "wanda"}, "note": "é"})
    assert record.read(tmp_path) == {"format_version": 1, "recipe": {"method": "wanda"}, "note": "é"}


def test_there_is_none(tmp_path):
    with pytest.raises(JpruneError, match=r"no jprune\.json there"):
        record.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 2}', "{}"])
def test_damaged_or_newer(tmp_path, content):
    (tmp_path / "jprune.json").write_text(content)
    with pytest.raises(JpruneError, match=r"jprune\.json"):
        record.read(tmp_path)
