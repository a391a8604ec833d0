"""The physically smaller function, by NumPy alone, and what masking must agree with."""

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees


def kept_positions(groups, keep):
    """{path: {axis: positions that stay}} after removing the units that `keep` (bool per group name) drops."""
    gone = {}
    for name, mask in keep.items():
        for m in groups[name].members:
            for p in range(m.length):
                if not mask[p // m.stride % len(mask)]:
                    gone.setdefault(m.path, {}).setdefault(m.axis, set()).add(m.offset + p)
    return gone


def smaller(params, groups, keep):
    """Parameters without the units that are dropped."""
    leaves = {path: np.asarray(x) for path, x in trees.flatten(params).items()}
    for path, axes in kept_positions(groups, keep).items():
        for axis, gone in axes.items():
            leaves[path] = np.delete(leaves[path], sorted(gone), axis)
    return trees.replace(params, {path: jnp.asarray(x) for path, x in leaves.items()})


def zeroed(params, groups, keep):
    """Parameters with zeros for the units that are dropped."""
    leaves = {path: np.array(x) for path, x in trees.flatten(params).items()}
    for path, axes in kept_positions(groups, keep).items():
        for axis, gone in axes.items():
            np.moveaxis(leaves[path], axis, 0)[sorted(gone)] = 0
    return trees.replace(params, {path: jnp.asarray(x) for path, x in leaves.items()})


def random_keep(groups, rng, names=None):
    """For some of the prunable groups, a random mask that keeps at least one unit and drops at least one."""
    chosen = [g for g in groups.prunable if (names is None and rng.random() < 0.7) or (names and g.name in names)]
    keep = {}
    for g in chosen or groups.prunable[:1]:
        mask = rng.random(g.size) < 0.6
        kept, dropped = rng.permutation(g.size)[:2]
        mask[kept], mask[dropped] = True, False
        keep[g.name] = mask
    return keep


def agree(f, params, args, groups, keep, small=None, *, rtol=2e-4):
    """Whether masked (and, where no mean is taken over a dropped unit, zeroed) is what the smaller function gives."""
    expected = jax.jit(small or f)(smaller(params, groups, keep), *args)
    candidates = [jax.jit(groups.masked(keep))(params, *args)]
    if not any(groups[name].renormalised for name in keep):
        candidates.append(jax.jit(f)(zeroed(params, groups, keep), *args))
    for got in candidates:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert np.isfinite(b).all(), "the test's network is not well conditioned"
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max() + 1e-3), err_msg=str(keep))
