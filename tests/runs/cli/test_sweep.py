"""`jprune sweep`: each cell is the `jprune prune` of its words, measured as `jprune compare` measures."""

import json

import numpy as np
import pytest
from fake_method import EveryOther

import jprune
from jprune.checkpoints import record
from jprune.cli import main
from jprune.data.for_model import evaluation_windows
from jprune.errors import JpruneError
from jprune.pipeline import sweep as sweeps
from jprune.pipeline.sweep import Cell, sweep


@pytest.fixture
def said(capsys):
    """(exit status, stdout, stderr) of the command."""

    def run(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_grid(said, tiny_model, token_file, tmp_path, monkeypatch):
    """Numbers of `compare`; a cell that fails is marked and the others go on; nothing that is done is done again."""
    dense, tokens, out = tiny_model(), token_file(), tmp_path / "grid"
    words = ["sweep", dense, "--methods", "magnitude, magnitude --skip attn", "--sparsities", "0.5,3:7"]
    words += ["--options", "--skip blocks/0/", "--text", tokens, "--out", out]
    status, told, err = said(*words, "--json")
    assert status == 1, "56 and 32 inputs: 3:7 fits the one, and not the other"
    assert "magnitude 3:7 failed" in err
    found = json.loads(told)
    half, _, feed_forward, _ = found["cells"]
    assert [asked["name"] for asked in found["grid"]["cells"]] == ["magnitude"] * 2 + ["magnitude --skip attn"] * 2
    for name, cell, own in (("a", half, []), ("b", feed_forward, ["--skip", "attn"])):
        own = ["--skip", "blocks/0/", *own]
        assert said("prune", "magnitude", dense, "--sparsity", "0.5", *own, "--out", tmp_path / name)[0] == 0
        _, pruned = json.loads(said("compare", dense, tmp_path / name, "--text", tokens, "--json")[1])["models"]
        for key in ("perplexity", "change", "divergence", "tail", "agreement", "sparsity"):
            assert cell[key] == pruned[key], key
    assert half["perplexity"] != feed_forward["perplexity"]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "sweep.json"], "no models are left"
    page = (out / "report.html").read_text()
    assert f"magnitude, zeros, % 33.33: {half['perplexity']['value']:.4g}" in page
    assert "magnitude 3:7 failed" in page

    done = ["sweep", dense, "--methods", "magnitude", "--sparsities", "0.5", "--text", tokens]
    done += ["--out", tmp_path / "one"]
    first = said(*done)
    monkeypatch.setattr(sweeps, "prune_model", lambda *_, **options: pytest.fail("done again"))
    assert said(*done) == first
    assert first[0] == 0
    status, _, err = said(*done, "--windows", "3")
    assert (status, "has another sweep, with other values of the evaluation text" in err) == (1, True)


@pytest.mark.parametrize(
    ("methods", "sparsities", "why"),
    [
        ("nonsense", "0.5", "--methods are of auto, magnitude"),
        ("magnitude --out x", "0.5", "--out is not for a cell"),
        ("magnitude 'x", "0.5", "cannot be read"),
        ("", "0.5", "give --methods"),
        ("magnitude", "1.5", "1.5"),
    ],
)
def test_what_is_refused_at_once(said, tmp_path, methods, sparsities, why):
    status, _, err = said("sweep", "nowhere", "--methods", methods, "--sparsities", sparsities, "--out", tmp_path / "x")
    assert status in (1, 2)
    assert why in err
    assert not (tmp_path / "x").exists()


def test_commas_in_quotes_do_not_separate():
    from jprune.cli.sweep import _split

    assert _split("wanda, sparsegpt --where 'a{1,2}' --refit 4,auto") == [
        ["wanda"], ["sparsegpt", "--where", "a{1,2}", "--refit", "4"], ["auto"],
    ]  # fmt: skip


def test_interrupted(tiny_model, token_file, tmp_path):
    """It goes on where it was, in the cell too, and gives the bits and the record of runs by themselves."""
    dense, tokens, held_out = jprune.load(tiny_model()), token_file(), token_file(4, 16, seed=2)
    recipe = jprune.Recipe(pattern=jprune.Unstructured(0.5), calibration=tokens)
    cells = [Cell(name=f"half {scale}", method=EveryOther(scale=scale), recipe=recipe) for scale in (1.0, 2.0)]
    seen = []

    def stop(step):
        seen.append(step.phase)
        if step.phase == "2/2 prune" and step.done >= 2:
            raise KeyboardInterrupt

    options = {"evaluation": lambda model: evaluation_windows(model, held_out), "keep_models": True}
    with pytest.raises(KeyboardInterrupt, match="1 of 2 cells are done and kept"):
        sweep(dense, cells, tmp_path / "grid", progress=stop, **options)
    assert len(list((tmp_path / "grid" / "models").glob("*.run"))) == 1
    again = []
    found = sweep(
        dense, cells, tmp_path / "grid", progress=lambda step: again.append((step.phase, step.done)), **options
    )
    assert not [phase for phase, _ in again if phase == "1/2 prune"]
    assert min(done for phase, done in again if phase == "2/2 prune") >= 1, "blocks that are done stay so"
    assert all("perplexity" in cell for cell in found["cells"])
    for number, cell in enumerate(cells, start=1):
        (kept,) = (tmp_path / "grid" / "models").glob(f"{number:02}-*")
        alone = tmp_path / f"alone-{number}"
        jprune.prune_model(dense, alone, method=cell.method, pattern=recipe.pattern, calibration=tokens)
        for path in dense.shapes:
            assert np.array_equal(jprune.load(kept).read(path), jprune.load(alone).read(path)), path
        theirs, ours = record.read(alone), record.read(kept)
        for name in ("recipe", "calibration", "model"):
            assert ours[name] == theirs[name]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(JpruneError, match=r"no sweep\.json"):
        sweep(dense, cells, tmp_path / "other", **options)
