"""Prune-and-Tune over a tiny model: zeros that stay and counts that are exact, the same by hand, killed and resumed."""

import dataclasses
import json
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jprune
from jprune import Magnitude, Unstructured, Wanda
from jprune.errors import JpruneError
from jprune.pipeline import prune_and_tune, prune_model
from jprune.pipeline.rounds.plan import plan_prune_and_tune
from jprune.pipeline.rounds.schedule import schedule
from jprune.tuning import Full, Lora

SHORT = {"steps": 3, "batch_size": 4, "micro_batch": 4, "learning_rate": 0.01}


def kernels(folder):
    model = jprune.load(folder)
    return {p: model.read(p) for p in model.shapes if p.startswith("blocks/") and p.endswith("kernel")}


def wanted(path, size, sparsity, method):
    """Zeros that a pattern asks for, by hand: in each output for Wanda, of the whole kernel for the others."""
    d_in = 56 if "down" in path else 32
    return int(d_in * sparsity) * (size // d_in) if isinstance(method, Wanda) else int(size * sparsity)


@pytest.mark.parametrize(
    ("method", "tuning", "rounds"),
    [
        (Magnitude(), Full(**SHORT, weight_decay=0.1), (0.0, 0.3, 0.6)),
        (Wanda(), Lora(**SHORT, rank=2), (0.3, 0.6)),
    ],
    ids=["magnitude-full", "wanda-lora"],
)
def test_zeros_stay_and_counts_are_exact_in_every_round(tiny_model, token_rows, tmp_path, method, tuning, rounds):
    folder = tiny_model(dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16")
    report = prune_and_tune(
        folder,
        tmp_path / "out",
        sparsity=0.6,
        rounds=rounds,
        method=method,
        tuning=tuning,
        keep_rounds=True,
        **token_rows,
    )
    assert not (tmp_path / "out.run").exists()
    names = sorted(path.name for path in (tmp_path / "out" / "rounds").iterdir())
    assert names == [f"{number}-sparsity-{sparsity:g}" for number, sparsity in enumerate(rounds, start=1)]
    before = kernels(folder)
    for name, sparsity, done in zip(names, rounds, report.rounds, strict=True):
        after = kernels(tmp_path / "out" / "rounds" / name)
        for path, old in before.items():
            assert (after[path][old == 0] == 0).all(), path
            assert (after[path] == 0).sum() == wanted(path, old.size, sparsity, method), path
            assert (after[path] != old)[after[path] != 0].any(), path  # it was trained
        assert done.sparsity == sparsity
        assert done.zeros == sum((x == 0).sum() for x in after.values())
        before = after
    for path, value in kernels(tmp_path / "out").items():
        np.testing.assert_array_equal(value, before[path])
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert [each["sparsity"] for each in record["rounds"]] == list(rounds)
    assert record["sparsity"]["zeros"] == report.rounds[-1].zeros == sum((x == 0).sum() for x in before.values())
    assert record["recipe"]["tuning"] == ("lora" if isinstance(tuning, Lora) else "full")
    # What is measured after one round is the model that the next one prunes.
    assert (report.before.value == report.rounds[0].perplexity_pruned) == (rounds[0] == 0)
    assert report.after.value == report.rounds[-1].perplexity_tuned
    assert all(each.perplexity_pruned != each.perplexity_tuned for each in report.rounds)
    assert all(each.steps == 3 for each in report.rounds)


def test_a_pruned_model_goes_on_from_where_it_is(tiny_model, token_rows, tmp_path):
    """Of the default rounds those that it has behind it are left out; its zeros stay."""
    prune_model(tiny_model(), tmp_path / "some", method=Magnitude(), pattern=Unstructured(0.4))
    report = prune_and_tune(
        tmp_path / "some", tmp_path / "out", sparsity=0.6, method=Magnitude(), tuning=Full(**SHORT), **token_rows
    )
    assert [each.sparsity for each in report.rounds] == [0.5, 0.6]
    before, after = kernels(tmp_path / "some"), kernels(tmp_path / "out")
    assert all((after[path][old == 0] == 0).all() for path, old in before.items())
    with pytest.raises(JpruneError, match=r"39.9. % of the prunable weights .* to have 30 %"):
        prune_and_tune(tmp_path / "some", tmp_path / "no", sparsity=0.3, **token_rows)


def test_a_loss_that_is_not_finite_stops_the_round_and_keeps_what_was_good(
    tiny_model, token_rows, tmp_path, monkeypatch
):
    folder = tiny_model()
    task = Full.task

    def broken(self, checkpoint, steps):
        """The second round's loss becomes NaN once its training has moved anything."""
        made = task(self, checkpoint, steps)
        if self.seed == 0:
            return made
        start = jax.tree.map(np.asarray, made.trainable)

        def loss(trainable, frozen, batch, key):
            total, weight = made.loss(trainable, frozen, batch, key)
            moved = jnp.any(trainable["embed"]["embedding"] != start["embed"]["embedding"])
            return jnp.where(moved, jnp.nan, total), weight

        return dataclasses.replace(made, loss=loss)

    options = {"sparsity": 0.6, "rounds": (0.3, 0.6), "method": Magnitude(), "tuning": Full(**SHORT), **token_rows}
    monkeypatch.setattr(Full, "task", broken)
    with pytest.raises(JpruneError, match=r"round 2 of 2 \(sparsity 0.6\): at step 2 the loss is nan .* after 1 steps"):
        prune_and_tune(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.run" / "round-1" / "tuned" / "model.safetensors").exists()
    assert [p.name for p in (tmp_path / "out.run" / "round-2" / "tuned.run").glob("step-*")] == ["step-00000001"]


def test_ctrl_c_says_which_round_and_keeps_it(tiny_model, token_rows, tmp_path):
    def press(progress):
        if progress.phase == "2/2 train" and progress.done >= 1:
            signal.raise_signal(signal.SIGINT)

    options = {"sparsity": 0.6, "rounds": (0.3, 0.6), "method": Magnitude(), "tuning": Full(**SHORT), **token_rows}
    folder = tiny_model()
    with pytest.raises(KeyboardInterrupt, match=r"in round 2 of 2 .*out\.run: go on .* `resume`"):
        prune_and_tune(folder, tmp_path / "out", progress=press, **options)
    assert (tmp_path / "out.run" / "round-1" / "tuned").is_dir()
    prune_and_tune(folder, tmp_path / "out", resume=True, **options)


def test_schedules():
    assert schedule(0.7) == (0.0, 0.1, 0.3, 0.5, 0.7)
    assert schedule(0.6) == (0.0, 0.1, 0.3, 0.5, 0.6)
    assert schedule(0.9) == (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
    assert schedule(0.9, present=0.4999) == (0.5, 0.7, 0.8, 0.9)
    assert schedule(0.5, present=0.5) == (0.5,)
    assert schedule(0.5, present=1e-5) == (0.0, 0.1, 0.3, 0.5)
    assert schedule(0.7, (0.5, 0.7)) == (0.5, 0.7)
    for given, said in [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": 0.7, "rounds": (0.5, 0.6)}, "end at 0.6 and not at the sparsity asked for, 0.7"),
        ({"sparsity": 0.7, "rounds": (0.5, 0.7, 0.8)}, "end at 0.8"),
        ({"sparsity": 0.7, "rounds": (0.7, 0.5, 0.7)}, r"go up within \[0, 1\)"),
        ({"sparsity": 0.7, "rounds": (0.5, 0.5, 0.7)}, r"go up within \[0, 1\)"),
        ({"sparsity": 0.7, "rounds": (50.0, 0.7)}, r"go up within \[0, 1\)"),
        ({"sparsity": 0.7, "rounds": (0.3, 0.7), "present": 0.4}, "40 % of the prunable weights are zero already"),
    ]:
        with pytest.raises(JpruneError, match=said):
            schedule(**given)


def test_bad_input_is_found_before_anything_is_done(tiny_model, token_rows, token_file, tmp_path):
    folder, other = tiny_model(), tiny_model("other", vocab_size=97)

    def refused(match, **options):
        given = {"sparsity": 0.5, "tuning": Full(**SHORT), **token_rows} | options
        with pytest.raises(JpruneError, match=match):
            prune_and_tune(folder, tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()

    refused("too little to train on: it has 3 windows", data=token_file(3, 16))
    refused("teacher's vocabulary has 97 tokens and the model's 96", tuning=Full(**SHORT, teacher=str(other)))
    refused("a warm-up of 9 steps leaves none of the 3", tuning=Full(**SHORT, warmup=9))
    refused("adapters cannot be kept apart", tuning=Lora(**SHORT, keep_adapters=True))
    refused("matches none of the", where=("blocks/7/",))
    refused(r"go up within \[0, 1\)", rounds=(0.5, 0.3, 0.5))
    # What only a round can see is said with its name, and leaves nothing behind if nothing was done.
    strange = token_file(6, 24, seed=9, vocab=500)
    refused(r"round 1 of 1 \(sparsity 0.5\): .*outside", rounds=(0.5,), calibration=strange)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(JpruneError, match="exists"):
        prune_and_tune(folder, tmp_path / "out", sparsity=0.5, **token_rows)


def test_a_plan_touches_nothing(tiny_model, token_file, tmp_path):
    folder = tiny_model()
    before = sorted(Path(tmp_path).rglob("*"))
    plan = plan_prune_and_tune(
        folder, sparsity=0.5, tuning=Full(**SHORT), tune_length=16, calibration=token_file(6, 24), out=tmp_path / "out"
    )
    assert [p for p in sorted(Path(tmp_path).rglob("*")) if p.suffix != ".npy"] == before
    assert plan.sparsities == (0.0, 0.1, 0.3, 0.5)
    sizes = [x.size for x in kernels(folder).values()]
    assert plan.zeros == tuple(sum(int(size * s) for size in sizes) for s in plan.sparsities)
    total = sum(int(np.prod(s.shape)) for s in jprune.load(folder).shapes.values())
    assert plan.tuning_tokens == 3 * 4 * 16
    assert plan.tuning_flops == 8 * total * plan.tuning_tokens
    assert plan.seconds > 0
