"""Statistics of what every parameter's matmul reads, gathered while the function runs: a forward hook for JAX."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jprune.errors import JpruneError
from jprune.places import Observed, Place
from jprune.statistics import zeros
from jprune.trace.jaxpr import PyTree, trace
from jprune.trace.matmuls import Where, find


def observe(
    f: Callable[..., PyTree], statistic: type[Any], *, where: Where = None, stacked: bool = False
) -> Callable[..., tuple[PyTree, Observed]]:
    """``f`` that also returns a statistic of the inputs of every matmul against a parameter.

    Args:
      f: any traceable function of (params, *args).
      statistic: what to remember of inputs, a class as in `jprune.statistics` (`Gram` for example). Matmuls that read
        the same value share one; of a parameter that is used more than once, the statistics of all inputs are merged.
      where: which parameters' matmuls count; all if None.
      stacked: whether stacks of kernels count, as in `matmuls`; their statistic is a `Stacked`.

    Returns:
      A function (params, *args) -> (f(params, *args), statistics by path), to be jitted like f. The statistics are an
      `Observed`, which knows where each kernel lies. Its derivatives are not those of f where f defines custom ones.

    Raises:
      JpruneError: when called, if `where` finds nothing, a matmul that counts lies inside control flow, or one
        parameter is used along different axes.
    """

    @functools.wraps(f)
    def observed(params: PyTree, *args: PyTree) -> tuple[PyTree, Observed]:
        flat = trace(f, params, *args)
        found = find(flat, where, stacked=stacked)
        run = flat.runner("observe", flat.equations, flat.args, [*flat.outputs, *(i.value for i in found.inputs)])
        values = run(jax.tree.leaves(params), jax.tree.leaves(args))
        output = jax.tree.unflatten(flat.output_tree, values[: len(flat.outputs)])
        matrices = [i.matrix(x) for i, x in zip(found.inputs, values[len(flat.outputs) :])]
        seen = [zeros(statistic, x.shape[-1], *x.shape[:-2]).update(x) for x in matrices]
        statistics: dict[str, Any] = {}
        places: dict[str, Place] = {}
        for matmul in found.matmuls.values():
            path, new = matmul.path, seen[matmul.input_id]
            place = Place(path=path, in_axes=matmul.in_axes, batch_axes=matmul.batch_axes)
            if places.setdefault(path, place) != place:
                raise JpruneError(
                    f"expected every matmul against {path} to sum over the same axes, found {places[path].in_axes} and "
                    f"{matmul.in_axes}: their statistics do not add; leave it out with `where`"
                )
            statistics[path] = statistics[path].merge(new) if path in statistics else new
        return output, Observed(statistics, places)

    return observed
