"""The kernels of a model, and which of them are pruned to which pattern.

Known from shapes and one abstract trace of each distinct block; no weight is read. What it takes: `forecast`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

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

    @property
    def d_in(self) -> int:
        """Number of inputs of the matrix view."""
        return math.prod(self.shape[axis] for axis in self.in_axes)

    @property
    def d_out(self) -> int:
        """Number of outputs of the matrix view; of one kernel of a stack."""
        return self.size // self.d_in // math.prod(self.stack)

    @property
    def stack(self) -> tuple[int, ...]:
        """How many kernels there are in a stack; empty if it is a single one."""
        return (math.prod(self.shape[axis] for axis in self.batch_axes),) if self.batch_axes else ()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def zeros(self) -> int:
        """Zeros that the pattern asks for."""
        return self.pattern.zeros(self.d_in, self.size // self.d_in)


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
        The head and the routers of experts are pruned only where an expression finds them.
      skip: regular expressions; what they find is left alone.
      overrides: other patterns by regular expression; of several that find a kernel the last one counts.

    Raises:
      JpruneError: an expression that finds nothing; a pattern that does not fit a kernel.
    """
    found = matmul_kernels(checkpoint)
    candidates = [path for path in found if where or not checkpoint.model.left_alone.search(path)]
    chosen = trees.choose(candidates, list(where) or None, skip)
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
        )
        kernel.pattern.check(kernel.d_in, path)
        kernels.append(kernel)
    return tuple(kernels)
