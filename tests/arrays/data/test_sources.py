import builtins
import gzip
import json
import sys
import types

import numpy as np
import pytest

from jprune.data import records, sources
from jprune.errors import JpruneError


def test_pydoc_splits_are_disjoint_and_deterministic():
    calibration = sources.read("pydoc", "calibration").text
    evaluation = sources.read("pydoc", "evaluation").text
    share = len(evaluation) / (len(calibration) + len(evaluation))
    assert 0.2 < share < 0.33
    assert sources.read("pydoc", "calibration").text == calibration

    def paragraphs(text):
        return {words for p in text.split("\n\n") if len(words := " ".join(p.split())) >= 60}

    assert not paragraphs(calibration) & paragraphs(evaluation)
    assert 'The "assert" statement' in calibration
    assert "str.capitalize()" in evaluation


def test_pydoc_missing_from_this_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(JpruneError, match="without pydoc_data"):
        sources.read("pydoc", "calibration")


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_text_file_serves_both_purposes(tmp_path, split):
    path = tmp_path / "a.txt"
    path.write_text("één\ntwee", encoding="utf-8")
    assert sources.read(path, split) == sources.Stream(text="één\ntwee")


def test_json_lines(tmp_path):
    lines = '{"text": "a"}\n\n{"text": "b", "url": 1}\n'
    plain, packed, c4_shard = (tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "c4.json.gz"))
    plain.write_text(lines)
    for path in (packed, c4_shard):
        with gzip.open(path, "wt") as file:
            file.write(lines)
    for path in (plain, packed, c4_shard):
        assert list(sources.read(path, "calibration").texts) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ('{"body": "a", "url": "b"}', r"line 1: .* found fields \['body', 'url'\]"),
        ('{"text": 3}', "line 1: expected an object with a string"),
        ("[1]", "line 1: .* found list"),
        (b'{"text": "a"}\n\n{"text": "\xff"}', "line 3: not UTF-8 text"),
        ('{"text": "a\0"}', "line 1: not JSON"),
        ("{}\n" + "[" * 10**5, "line 1: expected"),
        ("[" * 10**5, "line 1: not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "line 1: not JSON"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(JpruneError, match=message):
        sources.read(path, "calibration")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_files_as_editors_save_them(tmp_path, encoding, end):
    written = "één\n\n你好\n"
    objects = [{"text": "é\r\n你"}, {"text": "\N{BYTE ORDER MARK}b"}]
    lines = "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)
    packed = json.dumps(objects, ensure_ascii=False, indent=1)
    files = {"a.txt": written, "a.jsonl": lines, "a.json": packed, "a.jsonl.gz": lines}
    for name, text in files.items():
        content = text.replace("\n", end).encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert sources.read(tmp_path / "a.txt", "evaluation").text == written
    for name in list(files)[1:]:
        assert list(sources.read(tmp_path / name, "evaluation").texts) == [o["text"] for o in objects]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_halves_of_characters_are_replaced_with_a_notice(tmp_path, name):
    texts = [
        r'{"text": "ok \ud83d\ude00"}',
        r'{"text": "half \ud83d of \ude00\ud83d"}',
        r'{"text": "\ud800", "\udfff": [1]}',
    ]
    (tmp_path / name).write_text("\n".join(texts) if name == "a.jsonl" else f"[{','.join(texts)}]")
    got = sources.read(tmp_path / name, "calibration")
    assert list(got.texts) == ["ok \U0001f600", "half \ufffd of \ufffd\ufffd", "\ufffd"]
    assert "half of a character" in got.notices[0]
    assert name in got.notices[0]


@pytest.mark.parametrize(
    ("content", "line"), [(b"a\nb\xe9\n", 2), (b"a\r\n\nb\0c", 3), ("ab".encode("utf-16-le"), 1), (b"\xff\xfea", 1)]
)
def test_what_is_no_text_is_named_with_its_line(tmp_path, content, line):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(JpruneError, match=f"a.txt(, line {line}: not UTF| is not text: .* line {line}).*UTF-8"):
        sources.read(tmp_path / "a.txt", "calibration")


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(1000)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(JpruneError, match="damaged gzip"):
        sources.read(path, "calibration")
    path.write_bytes(b"not gzip at all")
    with pytest.raises(JpruneError, match="cannot be read"):
        sources.read(path, "calibration")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"], "id": [1, 2, 3]}), path)
    assert list(sources.read(path, "evaluation").texts) == ["a", "", "b"]
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(JpruneError, match="no column 'text'; its columns are body"):
        sources.read(path, "evaluation")
    repeated = pa.array(["a", None, "a"]).dictionary_encode()
    for text in (
        repeated,
        pa.chunked_array([repeated, repeated]),
        repeated.cast(pa.dictionary("int8", "large_string")),
    ):
        pq.write_table(pa.table({"text": text}), path)
        assert list(sources.read(path, "evaluation").texts) == ["a", "", "a"] * (len(text) // 3)
        assert [row["text"] for _, row in records.Reader(path)] == text.to_pylist()
    raw = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": raw}), path)
    for read in (lambda: sources.read(path, "evaluation"), lambda: list(records.Reader(path))):
        with pytest.raises(JpruneError, match="record 2: its text is not UTF-8"):
            read()
    pq.write_table(pa.table({"text": [1]}), path)
    with pytest.raises(JpruneError, match="holds int64"):
        sources.read(path, "evaluation")
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(JpruneError, match="not a readable parquet"):
        sources.read(path, "evaluation")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    hide(monkeypatch, "pyarrow")
    with pytest.raises(JpruneError, match=r"needs pyarrow: pip install 'jprune\[data\]'"):
        sources.read(path, "calibration")


def test_npy_is_memory_mapped(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6, dtype=np.uint16).reshape(2, 3))
    rows = sources.read(path, "calibration").rows
    assert isinstance(rows, np.memmap)
    np.testing.assert_array_equal(rows, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(6), r"has shape \(6,\); expected token ids \[n, length\]"),
        (np.zeros((2, 3)), r"holds float64; expected integer.*astype"),
        (np.zeros((2, 3), bool), "holds bool"),
        (np.array([["a"]], dtype=object), "not a readable"),
    ],
)
def test_bad_npy(tmp_path, array, message):
    path = tmp_path / "a.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(JpruneError, match=message):
        sources.read(path, "calibration")


def test_npy_of_other_content(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 100), np.int32))
    whole = path.read_bytes()
    with (tmp_path / "b.npz").open("wb") as file:
        np.savez(file, a=np.zeros((2, 2), np.int32))
    archive = (tmp_path / "b.npz").read_bytes()
    odd = whole.replace(b"(4, 100)", b"(4, (100"), whole.replace(b"'", b'"', 1)  # the header is Python
    for content in (b"", whole[:60], whole[:500], *odd, archive, b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(JpruneError, match="not a readable"):
            sources.read(path, "calibration")


def test_unknown_source_lists_what_there_is(tmp_path):
    with pytest.raises(JpruneError, match=r"'wikitekst' does not exist. A source is pydoc, .*hf:DATASET"):
        sources.read("wikitekst", "calibration")
    with pytest.raises(JpruneError, match="is a folder"):
        sources.read(tmp_path, "calibration")
    path = tmp_path / "a.bin"
    path.write_bytes(b"ab\xff")
    with pytest.raises(JpruneError, match=r"a.bin, line 1: not UTF-8 text"):
        sources.read(path, "calibration")


# --- Hugging Face datasets, through a stand-in for the package -------------------------------------------------------


class Dataset:
    """The face of datasets.Dataset that is used."""

    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}


@pytest.fixture
def hub(monkeypatch):
    """A module `datasets` that records the calls and serves `hub.data[split]`."""
    module = types.ModuleType("datasets")
    module.calls = []
    module.data = {
        "train": Dataset({"text": ["", " = A = ", "b"]}),
        "validation": Dataset({"text": ["v"] * 1200}),
        "test": Dataset({"text": ["x", "y"]}),
    }

    def load_dataset(name, config=None, *, split, data_files=None, verification_mode=None):
        assert (verification_mode == "no_checks") == (data_files is not None)
        module.calls.append((name, config, split, data_files))
        return module.data[split]

    module.load_dataset = load_dataset
    module.get_dataset_split_names = lambda name, config=None: list(module.data)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_wikitext_joins_as_the_originals(hub):
    assert sources.read("hf:wikitext", "calibration").text == "  = A =  b"
    assert sources.read("hf:wikitext", "evaluation").text == "x\n\ny"
    name = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert hub.calls == [(*name, "train", None), (*name, "test", None)]


def test_c4_shards(hub):
    assert list(sources.read("hf:c4:en", "calibration").texts) == ["", " = A = ", "b"]
    evaluation = sources.read("hf:c4", "evaluation")
    assert evaluation == sources.Stream(text=" ".join(["v"] * 1100), max_windows=256)
    assert hub.calls == [
        ("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"}),
        ("allenai/c4", None, "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"}),
    ]
    with pytest.raises(JpruneError, match="no split 'test'; it has train, validation"):
        sources.read("hf:c4::test", "evaluation")


def test_any_dataset(hub):
    texts = sources.read("hf:org/set", "calibration").texts
    assert len(texts) == 3
    assert texts[2] == "b"
    assert list(texts) == ["", " = A = ", "b"]
    sources.read("hf:org/set:small", "evaluation")
    sources.read("hf:org/set:small:validation", "calibration")
    del hub.data["test"]
    sources.read("hf:org/set", "evaluation")
    assert hub.calls == [
        ("org/set", None, "train", None),
        ("org/set", "small", "test", None),
        ("org/set", "small", "validation", None),
        ("org/set", None, "validation", None),
    ]


def test_bad_datasets(hub):
    for spec in ("hf:", "hf::a", "hf:a:b:c:d"):
        with pytest.raises(JpruneError, match=r"not of the form hf:DATASET\[:CONFIG\[:SPLIT\]\]"):
            sources.read(spec, "calibration")
    hub.data = {"extra": Dataset({"body": ["a"]})}
    with pytest.raises(JpruneError, match="no split train for calibration; it has extra"):
        sources.read("hf:a", "calibration")
    with pytest.raises(JpruneError, match="no column 'text'; its columns are body"):
        sources.read("hf:a::extra", "calibration")


def test_hub_out_of_reach(hub):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand a long trace")

    hub.load_dataset = offline
    with pytest.raises(JpruneError, match=r"'hf:c4' could not be loaded: Couldn't reach the Hub[^\n]*'pydoc'[^\n]*$"):
        sources.read("hf:c4", "calibration")


def test_without_datasets(monkeypatch):
    hide(monkeypatch, "datasets")
    with pytest.raises(JpruneError, match=r"needs the package datasets: pip install 'jprune\[data\]'"):
        sources.read("hf:wikitext", "evaluation")


def hide(monkeypatch, package):
    """Make `import package` fail, whether it is installed or not."""
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_a_json_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text": "b"}]')
    assert list(sources.read(path, "calibration").texts) == ["a", "b"]
    path.write_text('[{"text": "a"}, {"body": "b"}]')
    with pytest.raises(JpruneError, match=r"record 2: expected an object with a string in field 'text'"):
        sources.read(path, "calibration")
