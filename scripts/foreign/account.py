"""What becomes of one model's parameters, as a line of JSON. Run by foreign_models.py, in the model's environment."""

import importlib
import importlib.metadata
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import jprune


def changed(f, params, args, out, path) -> bool:
    """Whether the output depends on a leaf: it, and it alone, is replaced by other numbers, and by none (NaN).

    The latter tells of leaves that cancel out, as a bias of keys does in a softmax.
    """
    leaves = jprune.trees.flatten(params)
    leaf = leaves[path]
    other = jnp.asarray(np.random.default_rng(0).standard_normal(leaf.shape).astype(leaf.dtype))
    return any(
        bool(jnp.any(f(jprune.trees.replace(params, {**leaves, path: x}), *args) != out))
        for x in (other, other * jnp.asarray(jnp.nan, leaf.dtype))
    )


def main() -> None:
    """Prints the account of the model that the first word names; the second is the package it is made of."""
    name, package = sys.argv[1:]
    f, params, args = importlib.import_module(name).made()
    report = jprune.report(f, params, *args).json()
    warnings.simplefilter("ignore", UserWarning)  # of what is left out: the report says it
    out, observed = jprune.observe(f, jprune.Gram)(params, *args)
    errors = []
    for method in (jprune.SparseGPT(), jprune.Magnitude()):
        pruned, masks = jprune.prune(params, observed, method, jprune.Unstructured(0.5))
        errors.append(float(jnp.linalg.norm(f(pruned, *args) - out) / jnp.linalg.norm(out)))
    state = {leaf["path"]: leaf["state"] for leaf in report["leaves"]}
    leaves = jprune.trees.flatten(params)
    run = jax.jit(f)
    out = run(params, *args)
    misses = {path for path in leaves if path not in state}
    misses |= {path for path, kind in state.items() if (kind == "never read") == changed(run, params, args, out, path)}
    misses |= {path for path, kind in state.items() if (kind == "prunable") != (path in masks)}
    reasons = {f"{leaf['path']}: {s['reason']}" for leaf in report["leaves"] for s in leaf["skipped"]}
    print(
        json.dumps(
            {
                "model": name,
                "version": f"{package} {importlib.metadata.version(package)}",
                "jax": jax.__version__,
                "parameters": report["parameters"],
                "shares": report["shares"],
                "reasons": sorted(reasons),
                "errors": errors,
                "misses": sorted(misses),
                "report": report,
            }
        )
    )


if __name__ == "__main__":
    main()
