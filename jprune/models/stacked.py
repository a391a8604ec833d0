"""Equal neighbouring blocks stacked on a leading axis and run by one scan, so that a deep model compiles as one block.

A run of blocks i to j whose parameters have equal shapes (and whose functions are one: same window, same rope) becomes
one subtree ``blocks/i-j`` whose leaves are ``[j - i + 1, ...]``; a block without an equal neighbour stays ``blocks/i``.
A uniform model is a single run, one with sizes of its own in every layer has as many runs as layers. The paths say it
all, so unstacking needs no other description, and regular expressions such as ``attn/q/kernel`` find the same kernels.

Any tree with the model's paths can be stacked along: masks, adapters (``blocks/3/attn/q/kernel/a``), gradients.

Every block is rematerialised: its backward pass recomputes it from its input and from what is kept of it
(`jprune.train.remat`), so that training does not keep all intermediates.
"""

import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.annotations import Array, Float, Int
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.models.config import DecoderConfig
from jprune.models.decoder import Params
from jprune.models.kernels import Kernel, flatten
from jprune.train import remat

PyTree = Any
Runs = tuple[range, ...]
"""Layers by run, in their order; together they are all layers."""
Around = Callable[[Callable], Callable]
"""Turns a block f(params, x) into g(params, aside, x), where `aside` is whatever else belongs to that block."""

_BLOCK = re.compile(r"^blocks/(\d+)(?:-(\d+))?/")


def runs(config: DecoderConfig, *along: PyTree) -> Runs:
    """The runs of blocks that can be stacked.

    Args:
      config: the decoder's.
      *along: trees with paths ``blocks/<i>/...``: parameters, and whatever will be stacked beside them. Blocks are in
        one run if they have the same leaves (paths below the block, shapes and dtypes) in all of them.
    """
    leaves: list[dict[tuple[int, str], Any]] = [{} for _ in range(config.layers)]
    for number, tree in enumerate(along):
        for path, leaf in flatten(tree).items():
            if block := _BLOCK.match(path):
                leaves[int(block[1])][number, path[block.end() :]] = _kind(leaf)

    def same(i: int) -> bool:
        return leaves[i] == leaves[i - 1] and decoder.block(config, i) is decoder.block(config, i - 1)

    starts = [i for i in range(config.layers) if i == 0 or not same(i)]
    return tuple(range(a, b) for a, b in itertools.pairwise([*starts, config.layers]))


def name(run: range) -> str:
    """The key of a run below "blocks"."""
    return f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0])


def layers(key: str) -> range:
    """The layers of a key below "blocks"; the inverse of `name`."""
    first, _, last = key.partition("-")
    return range(int(first), int(last or first) + 1)


def members(paths: Iterable[str], runs: Runs) -> dict[str, tuple[str, ...]]:
    """For every path of the stacked tree, the paths of which its leaf is made: one for each layer of the run.

    Raises:
      JpruneError: a path is missing in some layer of a run.
    """
    paths = list(paths)
    of = {str(i): run for run in runs for i in run}
    result: dict[str, list[str]] = {}
    for path in paths:
        block = _BLOCK.match(path)
        stacked = path if block is None else f"blocks/{name(of[block[1]])}/{path[block.end() :]}"
        result.setdefault(stacked, []).append(path)
    for stacked, group in result.items():
        block = _BLOCK.match(stacked)
        expected = len(layers(block[0].split("/")[1])) if block else 1
        if len(group) != expected:
            raise JpruneError(f"{stacked}: expected a leaf in each of {expected} layers, found only {', '.join(group)}")
        group.sort(key=lambda path: int(match[1]) if (match := _BLOCK.match(path)) else 0)
    return {path: tuple(group) for path, group in result.items()}


def stack(tree: PyTree, runs: Runs) -> dict[str, Any]:
    """The tree with the blocks of every run stacked; leaves may be NumPy or JAX arrays, ShapeDtypeStructs or
    kernels that are none of these."""
    leaves = flatten(tree)
    made = {path: [leaves[p] for p in group] for path, group in members(leaves, runs).items()}
    return trees.unflatten({path: _stack(path, group) for path, group in made.items()})


def unstack(tree: PyTree) -> dict[str, Any]:
    """The tree with a subtree for each block again; the inverse of `stack`."""
    leaves = {}
    for path, leaf in flatten(tree).items():
        block = _BLOCK.match(path)
        if block is None or block[2] is None:
            leaves[path] = leaf
            continue
        for position, layer in enumerate(range(int(block[1]), int(block[2]) + 1)):
            leaves[f"blocks/{layer}/{path[block.end() :]}"] = _pick(leaf, position)
    return trees.unflatten(leaves)


def _kind(leaf: Any) -> Hashable:
    """Equal for leaves that can be stacked."""
    return leaf.kind if isinstance(leaf, Kernel) else (tuple(leaf.shape), jnp.dtype(leaf.dtype))


def _stack(path: str, leaves: Sequence[Any]) -> Any:
    block = _BLOCK.match(path)
    if block is None or block[2] is None:
        return leaves[0]
    if isinstance(leaves[0], Kernel):
        return leaves[0].stack(leaves[1:])
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)


def _pick(leaf: Any, position: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[position]


def hidden(
    config: DecoderConfig, *, around: Around | None = None, frozen: bool = False, every: bool = False
) -> Callable[..., Any]:
    """``f(params, tokens [B, L], aside=None) -> x [B, L, d_model]``: the last block's output, before the final norm.

    Args:
      config: the decoder's.
      around: changes what a block computes, for instance adds adapters to it. It is called inside the rematerialised
        function, so that nothing it makes (dequantised kernels, say) is kept for the backward pass.
      frozen: the blocks' parameters are not trained, only what `around` adds: what `remat.keeping` says of a block is
        kept for the backward pass.
      every: also return the outputs of all blocks, ``[layers, B, L, d_model]``.

    Params may be stacked or not; the blocks that are not are unrolled. With `around`, ``aside`` has the same keys as
    ``params["blocks"]``, each with a tree for that block, or for that run with a leading axis of its length.
    """
    embed = decoder.embed(config)

    def run(
        params: Params, tokens: Int[Array, "B L"], aside: Mapping[str, Any] | None = None
    ) -> Float[Array, "B L d_model"] | tuple[Float[Array, "B L d_model"], Float[Array, "layers B L d_model"]]:
        x = embed(params, tokens)
        outputs = []
        for key in sorted(params["blocks"], key=lambda key: layers(key)[0]):
            plain = decoder.block(config, layers(key)[0])
            block = _without_aside(plain) if around is None else around(plain)
            operands = params["blocks"][key], None if aside is None else aside[key]
            kept = config.layers if frozen else None
            if len(layers(key)) == 1:
                x = _again(block, kept, *operands, x)
                outputs.append(x[None])
            else:
                x, seen = jax.lax.scan(_step(block, kept, every), x, operands)
                outputs.append(seen)
        return (x, jnp.concatenate(outputs)) if every else x

    return run


def _without_aside(block: Callable) -> Callable:
    return lambda params, aside, x: block(params, x)


def _again(block: Callable, layers: int | None, *operands: PyTree, prevent_cse: bool = True) -> Array:
    """The block's output, for a backward pass that computes it again; with `layers`, what is kept of each is kept."""
    policy = None if layers is None else remat.keeping(block, layers, *operands)
    return jax.checkpoint(block, prevent_cse=prevent_cse, policy=policy)(*operands)


def _step(block: Callable, layers: int | None, every: bool) -> Callable:
    def step(x: Array, operands: tuple[PyTree, PyTree]) -> tuple[Array, Array | None]:
        # In a scan nothing can be shared between the two computations anyway, and the barrier costs speed.
        x = _again(block, layers, *operands, x, prevent_cse=False)
        return x, x if every else None

    return step


def apply(config: DecoderConfig, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B L vocab"]:
    """Logits (float32), as `decoder.apply`, of stacked parameters."""
    return decoder.head(config)(params, hidden(config)(params, tokens))
