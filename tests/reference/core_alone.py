"""What works on functions and pytrees, as a program for an environment of jax, optax and numpy alone.

python -m venv ALONE && ALONE/bin/pip install jax optax numpy && ALONE/bin/pip install --no-deps .
ALONE/bin/python tests/reference/core_alone.py
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jprune
from jprune.train import lora

WHOLE_MODELS = ("anatomy", "checkpoints", "data", "models", "pipeline", "runs", "tuning")
"""The rooms that may need more."""


def names() -> None:
    """Every public name is there, or is of whole models and says what to install."""
    missing = {}
    for name in (*jprune._LAZY, *jprune._MODULES):
        try:
            getattr(jprune, name)
        except jprune.JpruneError as error:
            missing[name] = error
    for name, error in missing.items():
        assert isinstance(error, ImportError)
        assert f"jprune.{name} needs the package {error.name}" in str(error), error
        assert "pip install jprune" in str(error), error
    assert {"decoder", "tune_model"} <= missing.keys()
    rooms = {(jprune._LAZY.get(name) or jprune._MODULES[name]).split(".")[1] for name in missing}
    assert rooms <= set(WHOLE_MODELS), rooms


def model(params, x):
    """Two matmuls whose inputs are correlated, as activations are."""
    return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def made() -> tuple[dict, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (8, 16))},
        "down": {"kernel": jax.random.normal(keys[1], (16, 8))},
    }
    return params, jax.random.normal(keys[2], (64, 4)) @ jax.random.normal(keys[3], (4, 8))


def oneshot(params, x) -> dict:
    """SparseGPT by what is observed, beside magnitude; then stage by stage. Returns the masks."""
    half = jprune.Unstructured(0.5)
    out, grams = jprune.observe(model, jprune.Gram)(params, x)
    errors = []
    for method in (jprune.SparseGPT(), jprune.Magnitude()):
        pruned, masks = jprune.prune(params, grams, method, half)
        assert all(int(mask.sum()) == mask.size // 2 for mask in masks.values())
        errors.append(float(jnp.linalg.norm(model(pruned, x) - out)))
    assert errors[0] < errors[1], errors

    stages = jprune.stages(model, params, x)
    staged, carry = params, stages.start(x)
    for s, matmuls in enumerate(stages.matmuls):
        carry = stages.segments[s](staged, carry)
        read = stages.inputs(s, carry)
        grams = {m.path: jprune.Gram.zeros(read[m.input_id].shape[1]).update(read[m.input_id]) for m in matmuls}
        where = [f"^{re.escape(m.path)}$" for m in matmuls]
        staged, _ = jprune.prune(staged, grams, jprune.SparseGPT(), half, where=where)
    carry = stages.segments[-1](staged, carry)
    np.testing.assert_allclose(stages.finish(carry), model(staged, x), rtol=1e-4, atol=1e-4)
    return masks


def structured(params, x) -> None:
    """The hidden units are one group; the smaller model is the one with these units cut out by hand."""
    groups = jprune.coupled_axes(model, params, x)
    (hidden,) = groups.prunable
    units = np.arange(0, 16, 3)
    keep = {member.path: {member.axis: hidden.positions(member, units)} for member in hidden.members}
    smaller = jprune.shrink(params, keep)
    np.testing.assert_array_equal(smaller["up"]["kernel"], params["up"]["kernel"][:, units])
    np.testing.assert_array_equal(smaller["down"]["kernel"], params["down"]["kernel"][units])


def training(params, x, masks) -> None:
    """Zeros stay, zeros grow, and adapters do what their products added to the kernels do."""

    def trained(last, steps):
        optimizer = optax.chain(optax.sgd(1e-3, momentum=0.9), last)
        state, now = optimizer.init(params), params
        for _ in range(steps):
            updates, state = optimizer.update(gradient(now), state, now)
            now = optax.apply_updates(now, updates)
        return now

    gradient = jax.jit(jax.grad(lambda params: jnp.mean(model(params, x) ** 2)))
    kept = trained(jprune.keep_masked(masks), 2)
    assert all(np.array_equal(kept[p.split("/")[0]]["kernel"] != 0, mask) for p, mask in masks.items())
    grown = trained(jprune.gradual(jprune.schedules.linear(0.75, begin=0, end=2), every=1), 3)
    assert all(int((kernel["kernel"] == 0).sum()) == 96 for kernel in grown.values())

    axes = {m.path: m.in_axes for m in jprune.matmuls(model, params, x)}
    adapters = lora.init(params, axes, rank=2, key=jax.random.key(4))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    adapted = lora.adapt(model, alpha=4)(params, adapters, None, x)
    merged = lora.merge(params, adapters, alpha=4, in_axes=axes)
    np.testing.assert_allclose(adapted, model(merged, x), rtol=1e-4, atol=1e-4)


def scaling() -> None:
    """A law through three points that lie on one (SciPy comes with JAX)."""
    law = jprune.scaling_law.fit([1e8, 1e9, 1e10], [1.7 + 400 / n**0.34 for n in (1e8, 1e9, 1e10)])
    assert abs(law.predict(3e8) - (1.7 + 400 / 3e8**0.34)) < 0.01


if __name__ == "__main__":
    assert importlib.util.find_spec("flax") is None, "this environment has more than jax, optax and numpy"
    assert importlib.util.find_spec("jaxtyping") is None
    names()
    params, x = made()
    masks = oneshot(params, x)
    structured(params, x)
    training(params, x, masks)
    scaling()
    print("the core works with jax, optax and numpy alone")
