"""The loop against a plain one, and against itself: cut into micro-batches, over devices, stopped and resumed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprune.errors import JpruneError
from jprune.train import metrics, sharding
from jprune.train.loop import Interrupted, Schedule, train
from jprune.train.optimizer import AdamW

VOCAB, WIDTH = 12, 8


def loss(trainable, frozen, batch, key):
    """A bigram model with noise on its frozen embedding."""
    x = frozen["embedding"][batch["tokens"][:, :-1]]
    x = x + 0.1 * jax.random.normal(key, x.shape[1:])
    logits = jax.nn.log_softmax(x @ trainable["kernel"] + trainable["bias"])
    each = -jnp.take_along_axis(logits, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(each * batch["weights"][:, 1:]), jnp.sum(batch["weights"][:, 1:])


def quiet(trainable, frozen, batch, key):
    """The same without randomness, which would depend on the micro-batch."""
    del key
    logits = jax.nn.log_softmax(frozen["embedding"][batch["tokens"][:, :-1]] @ trainable["kernel"] + trainable["bias"])
    each = -jnp.take_along_axis(logits, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(each * batch["weights"][:, 1:]), jnp.sum(batch["weights"][:, 1:])


class Stream:
    """Random batches whose place is a number."""

    def __init__(self, rows=4, end=None):
        self.rows, self.place, self.end = rows, 0, end

    def __next__(self):
        if self.place == self.end:
            raise StopIteration
        rng = np.random.default_rng(self.place)
        self.place += 1
        weights = (rng.random((self.rows, 6)) < 0.7).astype(np.float32)
        return {"tokens": rng.integers(0, VOCAB, (self.rows, 6)).astype(np.int32), "weights": weights}

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def start():
    rng = np.random.default_rng(5)
    frozen = {"embedding": rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)}
    return {"kernel": np.zeros((WIDTH, VOCAB), np.float32), "bias": np.zeros(VOCAB, np.float32)}, frozen


def run(steps=6, *, f=loss, batches=None, options=None, **more):
    config = AdamW(learning_rate=0.05, weight_decay=0.1)
    return train(
        f, *start(), batches or Stream(), config.transformation(steps), Schedule(steps=steps, **(options or {})),
        rate=config.rate(steps), **more,
    )  # fmt: skip


def losses(result):
    return [line["loss"] for line in result.history]


def same(a, b, **tolerance):
    for name in a:
        np.testing.assert_allclose(a[name], b[name], **tolerance)


def test_equals_a_plain_loop():
    trainable, frozen = start()
    tx, batches = AdamW(learning_rate=0.05, weight_decay=0.1).transformation(6), Stream()
    state, want = tx.init(trainable), []
    for _ in range(6):
        batch = next(batches)

        def mean(p, batch=batch):
            total, weight = quiet(p, frozen, batch, None)
            return total / weight

        value, grads = jax.value_and_grad(mean)(trainable)
        want.append(float(value))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    seen = []
    got = run(f=quiet, progress=seen.append)
    np.testing.assert_allclose(losses(got), want, rtol=1e-5)
    same(got.trainable, trainable, rtol=1e-5, atol=1e-6)
    assert want[-1] != want[0]
    assert [p.step for p in seen][-1] == 6
    assert seen[-1].tokens_per_second > 0
    assert seen[-1].seconds_left == 0
    np.testing.assert_allclose(got.history[0]["learning_rate"], 0.05, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_change_nothing(rows):
    whole, cut = run(f=quiet), run(f=quiet, options={"micro_batch": rows})
    np.testing.assert_allclose(losses(cut), losses(whole), rtol=1e-6)
    same(cut.trainable, whole.trainable, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shape", "names"), [((2,), ("data",)), ((2, 2), ("data", "fsdp")), ((4,), ("model",))])
def test_devices_change_nothing(shape, names):
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, names)
    whole, cut = run(), run(mesh=mesh, options={"micro_batch": 4})
    np.testing.assert_allclose(losses(cut), losses(whole), rtol=1e-5)
    same(cut.trainable, whole.trainable, rtol=1e-4, atol=1e-6)
    if names[-1] != "data":
        assert len(cut.trainable["kernel"].addressable_shards[0].data.ravel()) < WIDTH * VOCAB


def test_where_things_lie(four_devices):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "fsdp"))
    P = jax.sharding.PartitionSpec
    assert sharding.batch(mesh).spec == P(("data", "fsdp"))
    assert sharding.state(mesh, np.zeros((30, 64, 8))).spec == P(None, ("fsdp",))
    assert sharding.state(mesh, np.zeros((8, 8))).spec == P(None, ("fsdp",))
    assert sharding.state(mesh, np.zeros(3)).spec == P()
    assert sharding.batch_shares(mesh) == 4
    with four_devices():
        assert sharding.make_mesh(fsdp=2).shape == {"data": 2, "fsdp": 2}
    with four_devices(), pytest.raises(JpruneError, match=r"3 \(data\) x 1 \(fsdp\) needs 3 devices; there are 4"):
        sharding.make_mesh(data=3)


def test_optimizers_see_what_is_frozen_and_metrics_what_they_did(tmp_path):
    def update(updates, state, params=None, *, frozen):
        del params
        return jax.tree.map(jnp.zeros_like, updates), state + jnp.sum(frozen["embedding"])

    counts = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    options = {"folder": tmp_path, "watch": lambda trainable, state: {"seen": float(state)}}
    trained = train(loss, *start(), Stream(), counts, Schedule(steps=3), **options)
    total = start()[1]["embedding"].sum()
    for line in (trained.history, metrics.read(tmp_path / metrics.NAME)):
        np.testing.assert_allclose([step["seen"] for step in line], [total, 2 * total, 3 * total], rtol=1e-5)


def test_the_best_is_kept(tmp_path):
    """By an evaluation that likes the middle; in memory or in the folder."""
    results = []
    for folder in (None, tmp_path / "run"):
        scores = iter([3.0, 1.0, 2.0])
        result = run(evaluate=lambda p, f, s=scores: next(s), options={"evaluate_every": 2}, folder=folder)
        assert (result.step, result.evaluation_loss) == (4, 1.0)
        assert [line.get("evaluation_loss") for line in result.history] == [None, 3.0, None, 1.0, None, 2.0]
        results.append(result.trainable)
    same(*results, rtol=0)
    last = run()
    assert last.step == 6
    assert (np.asarray(last.trainable["kernel"]) != np.asarray(results[0]["kernel"])).any()
    for folder in (None, tmp_path / "last"):
        scores = iter([3.0, 1.0, 2.0])
        kept = run(
            evaluate=lambda p, f, s=scores: next(s), keep_best=False, options={"evaluate_every": 2}, folder=folder
        )
        assert (kept.step, kept.evaluation_loss) == (6, 2.0)
        same(kept.trainable, last.trainable, rtol=0)


def test_metrics_of_a_step_know_its_evaluation():
    """What `watch` says of a step may come from the evaluation after it."""
    measured = []

    def evaluate(trainable, frozen):
        measured.append(float(jnp.sum(trainable["bias"] ** 2)))
        return measured[-1]

    result = run(4, evaluate=evaluate, options={"evaluate_every": 2}, watch=lambda p, s: {"evaluated": len(measured)})
    assert [line["evaluated"] for line in result.history] == [0, 1, 1, 2]


def test_stopped_and_resumed(tmp_path):
    stream = Stream()

    seen = []
    with pytest.raises(Interrupted, match=r"after 3 of 6 steps; its state is in .*`resume`"):
        run(
            batches=stream,
            folder=tmp_path / "run",
            progress=lambda p: seen.append(p.step),
            stop=lambda: seen[-1] == 3.5,
            options={"micro_batch": 2},
        )
    again = run(folder=tmp_path / "run", resume=True, options={"micro_batch": 2})
    want = run(options={"micro_batch": 2})
    assert again.resumed_from == 3
    assert losses(again) == losses(want)
    same(again.trainable, want.trainable, rtol=0)


def test_other_runs_are_refused(tmp_path):
    run(folder=tmp_path / "run", settings={"rank": 8})
    with pytest.raises(JpruneError, match="a run that has not finished; go on with `resume`, or begin anew"):
        run(folder=tmp_path / "run", settings={"rank": 8})
    with pytest.raises(JpruneError, match="was begun with rank = 8 and cannot go on with 4"):
        run(folder=tmp_path / "run", settings={"rank": 4}, resume=True)
    with pytest.raises(JpruneError, match="was begun with steps = 6 and cannot go on with 7"):
        run(7, folder=tmp_path / "run", settings={"rank": 8}, resume=True)


def test_not_a_number(tmp_path):
    def breaks(trainable, frozen, batch, key):
        total, weight = quiet(trainable, frozen, batch, key)
        return jnp.where(jnp.any(batch["tokens"][0, 0] == 7), jnp.nan, 1.0) * total, weight

    bad = next(i for i in range(100) if next(at(i))["tokens"][0, 0] == 7)
    assert bad > 0
    with pytest.raises(JpruneError, match=rf"at step {bad + 1} the loss is nan .*after {bad} steps, are kept in .*run"):
        run(100, f=breaks, folder=tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings == {"steps": 100, "seed": 0}
    with pytest.raises(JpruneError, match=rf"at step {bad + 1} "):  # resumed, it meets the same batch
        run(100, f=breaks, folder=tmp_path / "run", resume=True)


def at(place):
    stream = Stream()
    stream.place = place
    return stream


def test_bad_input(tmp_path):
    with pytest.raises(JpruneError, match="the data ended after 3 of 6 steps"):
        run(batches=Stream(end=3))
    with pytest.raises(JpruneError, match="steps must be at least 1, got 0"):
        Schedule(steps=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(JpruneError, match="no folder for the state of the run can be made there"):
        run(folder=tmp_path / "file" / "run")


def test_nothing_to_learn_in_a_batch():
    class Empty(Stream):
        def __next__(self):
            return {name: x * (name == "tokens") for name, x in super().__next__().items()}

    result = run(f=quiet, batches=Empty())
    same(result.trainable, start()[0])


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    log = metrics.Metrics(tmp_path)
    log.write(1, loss=2.0)
    log.close()
    assert any((tmp_path / "tensorboard").iterdir())


def test_metrics_survive_a_cut_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]
    log = metrics.Metrics(tmp_path, after=1)
    log.write(2, loss=0.5)
    log.close()
    assert [line["loss"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [2.0, 0.5]


def test_leaves_without_gradient():
    """Whole numbers beside the parameters: the loss reads them, and the optimizer moves them."""

    def counting(trainable, frozen, batch, key):
        kernel = jnp.where(trainable["count"] < 2, trainable["kernel"], 0)
        return quiet({"kernel": kernel, "bias": jnp.zeros(VOCAB)}, frozen, batch, key)

    trainable = {"kernel": start()[0]["kernel"] + 0.5, "count": np.zeros(1, np.uint8)}
    seen = []

    def init(params):
        return optax.EmptyState()

    def update(updates, state, params, **extra):
        seen.append((updates["count"], sorted(extra)))
        return {"kernel": -0.1 * updates["kernel"], "count": np.uint8([1])}, state

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    got = train(counting, trainable, start()[1], Stream(), optimizer, Schedule(steps=4))
    assert got.trainable["count"].dtype == np.uint8
    np.testing.assert_array_equal(got.trainable["count"], [4])
    assert seen == [(None, ["frozen"])]  # traced once
    after = [line["gradient_norm"] for line in got.history]
    assert after[1] > 0
    assert after[2] == after[3] == 0  # the kernel counts for nothing
