"""Nothing runs from a checkpoint, nothing outside its folder is read, and what a result refers to lies in it."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jprune.checkpoints import formats, load
from jprune.errors import JpruneError

INDEX = "model.safetensors.index.json"


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return (open, (str(self.sprung), "w"))


@pytest.fixture
def trapped(folder, tmp_path):
    """A folder with pickles and Python files that write a file when they are opened, or run."""
    sprung = tmp_path / "sprung"
    code = f"open({str(sprung)!r}, 'w')\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own", "shared", "__init__", "setup", "conftest"):
        (folder / f"{name}.py").write_text(code + "from .shared import x\n" if name == "tokenization_own" else code)
    for name in ("pytorch_model.bin", "tokenizer.pkl", "vocab.pkl", "adapter_model.bin", "training_args.bin", "x.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    own = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": own, "transformers_weights": None}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenization_own.T", None], "AutoModel": "x.Y"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    yield folder
    assert not sprung.exists()


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_the_traps_work(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung"))).close()
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("format", ["hf", "jprune", "decilm", "orbax"])
def test_nothing_runs_and_nothing_is_missing(trapped, tmp_path, format):
    out = tmp_path / "out"
    out.mkdir()
    checkpoint = load(trapped)
    assert checkpoint.tokenizer is None
    formats.write(out, checkpoint, format=format)
    config = json.loads((out / "config.json").read_text())
    own = {"AutoConfig": "configuration_decilm.DeciLMConfig"} if format == "decilm" else None
    assert config.get("auto_map") == own
    assert "transformers_weights" not in config
    files = {"tokenizer_config.json", "tokenization_own.py", "shared.py"}  # a tokenizer is what it was
    assert files <= names(out)
    assert not names(out) & {"modeling_own.py", "configuration_own.py", "vocab.pkl", "tokenizer.pkl"}
    for name in ("tokenization_own.py", "shared.py"):
        assert (out / name).read_bytes() == (trapped / name).read_bytes()
    tokens = json.loads((out / "tokenizer_config.json").read_text())
    assert tokens == {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    assert load(out).shapes.keys() == checkpoint.shapes.keys()


@pytest.mark.parametrize("kind", ["llama", "own-llama"])
def test_transformers_loads_the_result_with_and_without_trust(trapped, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    config = json.loads((trapped / "config.json").read_text()) | {"model_type": kind}
    (trapped / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    formats.write(tmp_path / "out", load(trapped))
    for trust in (True, False):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"AutoTokenizer": ["tokenization_gone.T", None]}, None),
        ({"AutoTokenizer": "someone/model--tokenization_x.T"}, {"AutoTokenizer": "someone/model--tokenization_x.T"}),
        ({"AutoTokenizer": "../up.T"}, None),
        ("nonsense", None),
    ],
)
def test_code_that_is_not_there(folder, tmp_path, given, left):
    (tmp_path / "up.py").write_text("")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": given}))
    (tmp_path / "out").mkdir()
    formats.write(tmp_path / "out", load(folder))
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()).get("auto_map") == left
    assert not list((tmp_path / "out").glob("*.py"))


def test_only_pickles_are_refused(trapped):
    (trapped / "model.safetensors").unlink()
    (trapped / "adapter_model.bin").unlink()
    with pytest.raises(JpruneError, match="only pickled weights"):
        load(trapped)


# Links


def linked(folder, name, target):
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "LICENSE", "tokenizer_config.json", "tokenization_x.py"]
)
def test_links_out_of_a_folder_are_not_followed(folder, tmp_path, name):
    (folder / "LICENSE").write_text("terms")
    (folder / "tokenization_x.py").write_text("")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "tokenization_x.T"}}')
    load(folder).side_files  # noqa: B018 (all is well)
    linked(folder, name, tmp_path / "secret")
    with pytest.raises(JpruneError, match=rf"{name}: a link out of its folder, to .*secret.*not followed"):
        load(folder).side_files  # noqa: B018


@pytest.mark.parametrize("name", [INDEX, "model-00002-of-00002.safetensors", "adapter_config.json"])
def test_links_of_indexes_shards_and_adapters(tiny, tmp_path, name):
    config = tiny.config()
    folder = tiny.write_sharded(tmp_path / "in", config, tiny.tensors(config))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    linked(folder, name, tmp_path / "secret.safetensors")
    with pytest.raises(JpruneError, match="a link out of its folder"):
        load(folder, adapter=folder)


def test_links_within_a_folder_and_to_a_folder(folder, tmp_path):
    (folder / "real").mkdir()
    linked(folder, "model.safetensors", folder / "real" / "weights")
    (tmp_path / "link").symlink_to(folder)
    for source in (folder, tmp_path / "link"):
        assert load(source).read("final_norm/scale").shape == (16,)
        load(source).side_files  # noqa: B018


def test_a_file_that_is_given_may_be_a_link(folder, tmp_path):
    linked(folder, "model.safetensors", tmp_path / "weights")
    assert load(folder / "model.safetensors").shapes


@pytest.mark.parametrize(("repository", "works"), [("models--a--b", True), ("elsewhere", False)])
def test_the_cache_of_hugging_face(folder, tmp_path, repository, works):
    blobs, snapshot = tmp_path / repository / "blobs", tmp_path / repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    if works:
        assert load(snapshot).shapes
        (snapshot / "LICENSE").symlink_to(tmp_path / "secret")
        with pytest.raises(JpruneError, match="LICENSE: a link out of its folder"):
            load(snapshot).side_files  # noqa: B018
    else:
        with pytest.raises(JpruneError, match="a link out of its folder"):
            load(snapshot)


def test_names_in_files_are_no_paths(folder, tmp_path):
    """Names of tensors and of aliases never become paths."""
    tensors = load_file(folder / "model.safetensors") | {"../../x.rotary_emb.inv_freq": np.ones(1, np.float32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "../../y": "../../x.rotary_emb.inv_freq"})
    with pytest.raises(JpruneError, match="not part of a LlamaForCausalLM"):
        load(folder)
