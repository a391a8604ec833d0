import pytest

from jprune.errors import JpruneError
from jprune.runs import memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("2e9", 2 * 10**9), ("100", 100), ("3k", 3000)],
)
def test_sizes(text, size):
    assert memory.parse(text) == size


@pytest.mark.parametrize("text", ["", "much", "6XB", "-1GB", "0", "1..2G", "GB"])
def test_no_sizes(text):
    with pytest.raises(JpruneError, match="is not an amount of memory"):
        memory.parse(text)


def test_what_there_is():
    assert 0 < memory.resident() < memory.default_limit()
    assert memory.free() < 2**50


def test_a_container_has_less(monkeypatch, tmp_path):
    """Limits of a control group count, and its file cache is as good as free."""
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    monkeypatch.setattr(memory, "GROUPS", ((tmp_path / "memory.max", tmp_path / "memory.current"),))
    assert memory.free() == 900_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free() > 900_000
