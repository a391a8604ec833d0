"""The perplexity of the demo model is measured once, and again whenever anything it depends on has changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import devices
from jprune.evaluate.perplexity import Perplexity
from jprune.runs import remembered


@pytest.fixture
def measured(tiny_model, tmp_path, monkeypatch):
    """A function that asks for the perplexity of a tiny model in the place of the demo, and says if it was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, calls = tiny_model(), []

    def perplexity(weights, tokens, **options):
        calls.append(options)
        n, length = tokens.shape
        return Perplexity(value=1 / 3 + len(calls), tokens=tokens.size, sequence_length=length, windows=n)

    monkeypatch.setattr(remembered.measuring, "perplexity", perplexity)

    def ask(tokens, *, source="demo", dtype=jnp.float32, mesh=None):
        checkpoint, before = jprune.load(folder), len(calls)
        checkpoint.source = source
        found = remembered.perplexity(checkpoint, tokens, dtype=dtype, mesh=mesh or devices.one_device())
        return found, len(calls) > before

    return ask


TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4)


def files(tmp_path):
    return sorted((tmp_path / "cache" / "jprune" / "perplexity").glob("*"))


def test_a_second_run_does_not_measure(measured, tmp_path):
    first, was_measured = measured(TOKENS)
    assert was_measured
    assert measured(TOKENS) == (first, False)
    assert len(files(tmp_path)) == 1


def test_other_models_are_measured_each_time(measured, tmp_path):
    assert measured(TOKENS, source="elsewhere")[1]
    assert measured(TOKENS, source="elsewhere")[1]
    assert files(tmp_path) == []


def test_whatever_it_depends_on(measured, monkeypatch):
    measured(TOKENS)
    assert measured(TOKENS + 1)[1]
    assert measured(TOKENS.reshape(2, 6))[1]
    assert measured(TOKENS, dtype=jnp.bfloat16)[1]
    assert measured(TOKENS, mesh=devices.make_mesh(2, devices=jax.devices()[:2]))[1]
    with monkeypatch.context() as patched:
        patched.setattr(remembered, "environment", lambda dtype: {"dtype": "float32", "versions": {}, "device": "cpu"})
        assert measured(TOKENS)[1]
    with monkeypatch.context() as patched:
        patched.setattr(remembered, "_program", lambda: "another")
        assert measured(TOKENS)[1]
    assert not measured(TOKENS)[1]


@pytest.mark.parametrize("contents", [b"", b"{", b'{"checksum": 1, "contents": {"value": 2.0}}', b"[]"])
def test_a_damaged_file_is_measured_again(measured, tmp_path, contents):
    measured(TOKENS)
    files(tmp_path)[0].write_bytes(contents)
    assert measured(TOKENS)[1]
    assert not measured(TOKENS)[1]


def test_a_cache_that_cannot_be_written_costs_nothing_else(measured, tmp_path):
    (tmp_path / "cache").write_text("")
    assert measured(TOKENS)[1]
    assert measured(TOKENS)[1]
