"""The kernels of a model, and which of them are pruned to which pattern.

Known from shapes and one abstract trace of each distinct block; no weight is read. What it takes: `forecast`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.anatomy.parts import Part, parts
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.patterns import Pattern
from jprune.trace import ParamMatmul

HEAD = "head/kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of the plan."""

    path: str
    unit: str
    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    stage: int
    pattern: Pattern
    batch_axes: tuple[int, ...] = ()
    """The axes that number the kernels of a stack, such as experts, each with inputs of its own."""
    chosen: tuple[int, ...] | None = None
    """The numbers of the kernels of a stack that are pruned, ascending; None for all."""

    @property
    def d_in(self) -> int:
        """Number of inputs of the matrix view."""
        return math.prod(self.shape[axis] for axis in self.in_axes)

    @property
    def d_out(self) -> int:
        """Number of outputs of the matrix view; of one kernel of a stack."""
        return self.whole // self.d_in // math.prod(self.stack)

    @property
    def stack(self) -> tuple[int, ...]:
        """How many kernels there are in a stack; empty if it is a single one."""
        return (math.prod(self.shape[axis] for axis in self.batch_axes),) if self.batch_axes else ()

    @property
    def whole(self) -> int:
        """Number of parameters, pruned or not."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """How many kernels are pruned: of a stack the chosen ones, else one."""
        return math.prod(self.stack) if self.chosen is None else len(self.chosen)

    @property
    def size(self) -> int:
        """Number of parameters that are pruned."""
        return self.count * self.d_in * self.d_out

    @property
    def zeros(self) -> int:
        """Zeros that the pattern asks for."""
        return self.count * self.pattern.zeros(self.d_in, self.d_out)

    @property
    def named(self) -> str:
        """The path, and which of a stack are pruned if not all are."""
        return self.path if self.chosen is None else f"{self.path} of {', '.join(map(str, self.chosen))}"

    def takes(self, i: int) -> bool:
        """Whether the kernel number i of the stack is pruned."""
        return self.chosen is None or i in self.chosen

    def part(self, values: Any) -> Any:
        """What is pruned of its values, an array of NumPy or JAX: all of them, or ``[chosen, ...]`` of a stack."""
        if self.chosen is None:
            return values
        rest = [axis for axis in range(len(self.shape)) if axis not in self.batch_axes]
        stack = values.transpose(*self.batch_axes, *rest)
        return stack.reshape(*self.stack, *(self.shape[axis] for axis in rest))[list(self.chosen),]

    def joined(self, values: jax.Array, others: jax.Array) -> jax.Array:
        """What is pruned from one array of the kernel's shape, and the kernels of a stack that are not from another."""
        if self.chosen is None:
            return values
        stack = np.isin(np.arange(self.stack[0]), self.chosen).reshape([self.shape[axis] for axis in self.batch_axes])
        along = stack.transpose(np.argsort(self.batch_axes))
        rest = [axis for axis in range(len(self.shape)) if axis not in self.batch_axes]
        return jnp.where(np.expand_dims(along, rest), values, others)


def matmul_kernels(checkpoint: Checkpoint) -> dict[str, tuple[Part, ParamMatmul]]:
    """Every kernel that could be pruned, by path. All but the head's are the model's prunable parameters."""
    d_model = checkpoint.model.d_model
    return {part.path(matmul.path): (part, matmul) for part in parts(checkpoint) for matmul in part.matmuls(d_model)}


def prunable(checkpoint: Checkpoint, kernels: Iterable[Kernel] = ()) -> list[str]:
    """Paths of the prunable parameters: the kernels of the blocks, and the head where it is among `kernels`."""
    chosen, left_alone = {kernel.path for kernel in kernels}, checkpoint.model.left_alone
    return [path for path in matmul_kernels(checkpoint) if path in chosen or not left_alone.search(path)]


def choose_kernels(
    checkpoint: Checkpoint,
    pattern: Pattern,
    *,
    where: Iterable[str] = (),
    skip: Iterable[str] = (),
    overrides: Mapping[str, Pattern] | None = None,
) -> tuple[Kernel, ...]:
    """The kernels to prune, each with its pattern.

    Args:
      checkpoint: the model.
      pattern: for every kernel without an override.
      where: regular expressions over paths such as ``blocks/3/attn/q/kernel``; by default all kernels of all blocks.
        The head and the routers of experts are pruned only where an expression finds them. Of stacks the kernels of
        single experts have names too, see `single`.
      skip: regular expressions; what they find is left alone.
      overrides: other patterns by regular expression, over paths alone; of several that find a kernel the last one
        counts.

    Raises:
      JpruneError: an expression that finds nothing; a pattern that does not fit a kernel.
    """
    found = matmul_kernels(checkpoint)
    candidates = {
        path: math.prod(checkpoint.shapes[path].shape[axis] for axis in axes) if (axes := matmul.batch_axes) else 0
        for path, (_, matmul) in found.items()
        if where or not checkpoint.model.left_alone.search(path)
    }
    chosen = _choose(candidates, list(where), list(skip))
    if not chosen:
        raise JpruneError("the filters leave no kernel to prune; widen `where` or narrow `skip`")
    own = {path: p for regex, p in (overrides or {}).items() for path in trees.found(regex, chosen)}
    kernels = []
    for path in chosen:
        part, matmul = found[path]
        shape = checkpoint.shapes[path].shape
        kernel = Kernel(
            path=path,
            unit=part.name,
            shape=shape,
            in_axes=matmul.in_axes,
            stage=matmul.stage,
            pattern=own.get(path, pattern),
            batch_axes=matmul.batch_axes,
            chosen=chosen[path],
        )
        kernel.pattern.check(kernel.d_in, path)
        kernels.append(kernel)
    return tuple(kernels)


def single(path: str, number: int) -> str:
    """What one kernel of a stack is called where kernels are chosen.

    Its number follows the part of the path that is named ``experts``, as ``blocks/3/mlp/experts/5/up/kernel``, or the
    whole path if there is none.
    """
    before, experts, after = path.rpartition("experts/")
    return f"{before}{experts}{number}/{after}" if experts else f"{path}/{number}"


def _choose(stacks: Mapping[str, int], where: list[str], skip: list[str]) -> dict[str, tuple[int, ...] | None]:
    """The paths that are pruned, and which numbers of a stack; None for all.

    Args:
      stacks: how many kernels are in a stack, by path; 0 for a single kernel.
      where: expressions over paths and what is said by `single`; all paths if there are none.
      skip: such expressions.
    """
    atoms = {path: {(path, i) for i in range(max(count, 1))} for path, count in stacks.items()}
    by_name = {single(path, i): (path, i) for path, count in stacks.items() for i in range(count)}

    def found(regex: str) -> set[tuple[str, int]]:
        own, whole = trees.matching(regex, by_name), trees.matching(regex, stacks)
        if not (own or whole):
            named = f"; single experts are named as {next(iter(by_name))}" if by_name else ""
            raise JpruneError(f"{trees.missed(regex, list(stacks))}{named}")
        return {by_name[name] for name in own}.union(*(atoms[path] for path in whole))

    wanted = set[tuple[str, int]]().union(*(map(found, where) if where else atoms.values()))
    left = wanted.difference(*map(found, skip))
    chosen = {path: own & left for path, own in atoms.items()}
    return {
        path: None if own == atoms[path] else tuple(sorted(i for _, i in own)) for path, own in chosen.items() if own
    }
