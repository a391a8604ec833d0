"""Domains and dynamic loading as a user types them."""

import importlib
import json

import jax
import numpy as np
import pytest

from jprune.cli import main
from jprune.errors import UsageError
from jprune.pipeline.options import DynamicLoading
from jprune.train.shearing.dynamic_loading import Reweighing

parse = importlib.import_module("jprune.cli.main").parse


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", str(tmp_path / "cache"))


def options(*words):
    return parse("tune full", ["model", "--out", "out", *words]).options()


def test_words():
    assert options("--data", "pydoc")["data"] == "pydoc"
    assert options("--data", "./a=b.txt")["data"] == "./a=b.txt"  # a path
    got = options(
        "--data", "web=hf:c4", "--data", "my-code.2=dir/x=y.npy", "--proportions", "web=0.7,my-code.2=0.3",
        "--evaluate", "web=web.txt",
    )  # fmt: skip
    assert got["data"] == {"web": "hf:c4", "my-code.2": "dir/x=y.npy"}
    assert got["proportions"] == {"web": 0.7, "my-code.2": 0.3}
    assert got["evaluate"] == {"web": "web.txt"}
    assert got["dynamic_loading"] is None
    two = ["--data", "a=x", "--data", "b=y", "--dynamic-loading"]
    got = options(*two, "--reference-loss", "a=1.9,b=2", "--loading-step-size", "0.5", "--loading-clip")
    assert got["dynamic_loading"] == DynamicLoading(
        reference_losses={"a": 1.9, "b": 2.0}, reweighing=Reweighing(step_size=0.5, clip=True)
    )
    assert options(*two, "--reference", "demo")["dynamic_loading"] == DynamicLoading(reference="demo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --data SOURCE, or --data NAME=SOURCE"),
        (["--data", "a", "--data", "b"], "--data is given 2 times; name the domains: --data NAME=a"),
        (["--data", "a=x", "--data", "y"], "--data y has no name, and others have: --data NAME=y"),
        (["--data", "a=x", "--data", "a=y"], "--data names 'a' twice"),
        (["--data", "a=x", "--proportions", "a=1,a=2"], "--proportions names 'a' twice"),
        (["--data", "a=x", "--proportions", "a=much"], "--proportions is NAME=NUMBER,NAME=NUMBER,...; got 'a=much'"),
        (["--data", "a=x", "--reference-loss", "1.9"], "--reference-loss is NAME=NUMBER"),
        (["--data", "a=x", "--reference-loss", "a=1"], "need --dynamic-loading"),
        (["--data", "a=x", "--loading-clip"], "need --dynamic-loading"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(UsageError) as error:
        options(*words)
    assert message in str(error.value)


def test_a_recipe_with_tables(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'method = "full"\nsteps = 7\ndynamic_loading = true\n'
        '[data]\nweb = "web.txt"\ncode = "code.txt"\n[reference_loss]\nweb = 2.5\ncode = 1.5\n'
    )
    got = options("--recipe", str(tmp_path / "recipe.toml"))
    assert got["data"] == {"web": "web.txt", "code": "code.txt"}
    assert got["dynamic_loading"].reference_losses == {"web": 2.5, "code": 1.5}
    got = options("--recipe", str(tmp_path / "recipe.toml"), "--reference-loss", "web=3,code=1")
    assert got["dynamic_loading"].reference_losses == {"web": 3.0, "code": 1.0}


def test_the_command(tiny_model, tmp_path, capsys):
    folder = tiny_model()
    rng = np.random.default_rng(0)
    for name in ("web", "code"):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 96, (20, 12), dtype=np.int32))
    np.save(tmp_path / "empty.npy", np.zeros((0, 12), np.int32))
    words = [
        "tune", "full", folder, "--data", f"web={tmp_path}/web.npy", "--data", f"code={tmp_path}/code.npy",
        "--proportions", "web=3,code=1", "--steps", "2", "--batch-size", "4", "--evaluate-every", "1",
        "--out", tmp_path / "out",
    ]  # fmt: skip

    def run(*more):
        status = main([str(word) for word in (*words, *more)])
        return status, *capsys.readouterr()

    def fails(*more, match):
        status, out, err = run(*more)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert match in err

    fails("--dynamic-loading", match="either a reference loss for every domain (--reference-loss NAME=LOSS,...)")
    fails("--dynamic-loading", "--reference-loss", "web=1", match="none is given for 'code'")
    fails("--data", f"none={tmp_path}/empty.npy", "--proportions", "none=1", match="domain 'none': ")
    assert not (tmp_path / "out").exists()
    status, out, _ = run("--dynamic-loading", "--reference-loss", "web=4,code=4", "--json")
    assert status == 0
    found = json.loads(out)["domains"]
    assert list(found) == ["web", "code"]
    assert found["web"]["weight"]["first"] == 0.75
    assert found["web"]["weight"]["last"] + found["code"]["weight"]["last"] == pytest.approx(1)
    assert found["code"]["reference_loss"] == 4.0
    status, out, _ = run("--overwrite")
    assert status == 0
    assert "code: loss " in out
    assert "weight 0.2500 to 0.2500" in out
