"""The leaves of a function's arguments that are arrays, and those that are not: numbers of Python, words, functions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jprune.errors import JpruneError

PyTree = Any


Numbers = tuple[type, ...]
PARAMETERS: Numbers = (int, float, complex)
ARGUMENTS: Numbers = (float, complex)
"""Which numbers of Python are arrays. An integer argument is a constant: it may be a size, or the number of a layer."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """The structure of a tree, and those of its leaves that are no arrays: numbers of Python, words, functions."""

    structure: Any
    others: tuple[tuple[int, Any], ...]
    """By their place among all leaves."""

    def fill(self, arrays: Sequence[Any]) -> PyTree:
        """The tree with these arrays."""
        rest, others = iter(arrays), dict(self.others)
        return jax.tree.unflatten(
            self.structure, [others[i] if i in others else next(rest) for i in range(self.structure.num_leaves)]
        )

    def arrays(self, tree: PyTree, what: str, numbers: Numbers = ARGUMENTS) -> list[Any]:
        """The leaves that are arrays of a tree like this one.

        Raises:
          JpruneError: it has another structure, or other leaves that are no arrays.
        """
        leaves, got = split(tree, numbers)
        if got != self:
            raise JpruneError(f"expected {what} with the tree that was traced, {self}; got {got}")
        return leaves

    def __str__(self) -> str:
        others = ", ".join(repr(value) for _, value in self.others)
        return f"{self.structure}" + (f" with {others}" if others else "")


def split(tree: PyTree, numbers: Numbers = ARGUMENTS) -> tuple[list[Any], Tree]:
    """The leaves of a tree that are arrays (or shapes of some), and all that is needed to put others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    others = tuple((i, x) for i, x in enumerate(leaves) if not is_array(x, numbers))
    return [x for x in leaves if is_array(x, numbers)], Tree(structure, others)


def is_array(leaf: Any, numbers: Numbers = ARGUMENTS) -> bool:
    """Whether a leaf is an array, says the shape of one, or is one of these numbers."""
    as_number = isinstance(leaf, numbers) and not isinstance(leaf, bool)
    return as_number or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))
