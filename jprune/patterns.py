"""Patterns: what the zeros of a pruned kernel must look like. A pattern owns all that is known of it.

A pattern speaks of a kernel's matrix view ``[d_in, d_out]``. `Unstructured` asks for a share of zeros and says among
which elements scores compete; `NM` keeps n of every m consecutive inputs of each output (``2:4`` keeps 2 of 4).

A new pattern is one subclass of `Pattern`: how many zeros it has, and the mask that it takes from scores. That is
enough for every method. SparseGPT then chooses its mask once, from the weights as they are, and solves for what is
left; a pattern with a `schedule` is chosen on the way, from weights that make up for what was pruned before.
"""

import abc
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune import counts, masks, trees
from jprune.annotations import Array, Bool, Float
from jprune.errors import JpruneError

Scope = Literal["output", "block", "kernel"]

MIXED = 8
"""Inputs of a group of N:M whose N may differ from block to block."""
SPARSEST = 0.95
"""The highest share of zeros in a kernel that makes up for others."""

# For each shape, and not for each sparsity: counts are arguments of the program.
_keep_n_of_m = jax.jit(masks.keep_n_of_m, static_argnums=(1, 2))
_without_lowest = jax.jit(masks.without_lowest, static_argnames="per")


class Schedule(NamedTuple):
    """How many zeros a solver chooses in which inputs, when it goes through them slice by slice."""

    size: int
    """Inputs of a slice; the last slice may have fewer."""
    zeros: tuple[int, ...]
    """Zeros of each slice: of every output, or of all outputs together."""
    per_output: bool
    grouped: bool = False
    """The slices are groups that the pattern is made of, all with the same number of zeros for every output. A solver's
    block then consists of whole groups; otherwise it is one slice."""


class Steps(NamedTuple):
    """The numbers of zeros that a kernel has under patterns of one kind, counted in steps."""

    zeros: int
    """Steps of the pattern."""
    least: int
    """Steps of the densest pattern that one may be replaced by, where others become sparser for it."""
    most: int
    """Of the sparsest."""
    of: int
    """Steps of a kernel that has only zeros."""
    each: int
    """Elements of a step."""


@dataclasses.dataclass(frozen=True)
class Pattern(abc.ABC):
    """What the zeros of a kernel must look like; each kind is a frozen dataclass."""

    form: ClassVar[str | None] = None
    """How the pattern is written, with an example; None if `read` reads no text."""

    @abc.abstractmethod
    def zeros(self, d_in: int, d_out: int) -> int:
        """Exact number of zeros in a kernel ``[d_in, d_out]``."""

    @abc.abstractmethod
    def select(
        self, scores: Float[Array, "d_in d_out"], keep: Bool[Array, "d_in d_out"] | None = None
    ) -> Bool[Array, "d_in d_out"]:
        """The mask that satisfies the pattern and keeps the highest scores, see `jprune.masks.select`.

        Called within and outside of compiled programs, so what takes long is to be compiled here.
        """

    def check(self, d_in: int, where: str = "kernel") -> None:
        """Raises `JpruneError`, naming `where`, if the pattern cannot hold for `d_in` inputs; by default it can."""
        del d_in, where

    @property
    def by_input(self) -> bool:
        """Whether it matters which axes of a kernel are its inputs."""
        return True

    def of(self, i: int) -> "Pattern":
        """The pattern of the kernel number i of a stack; by default all have the same."""
        return self

    def among(self, per: Scope) -> "Pattern":
        """This pattern, with scores competing as `per` says if the pattern leaves that open; by default it does not."""
        return self

    def schedule(self, d_in: int, d_out: int, block: int) -> Schedule | None:
        """How a solver that goes through the inputs in blocks, of `block` if it can, is to choose the zeros.

        By default None: the mask is chosen once, for the whole kernel.
        """
        return None

    def steps(self, d_in: int, d_out: int) -> Steps:
        """How sparser and denser patterns of this kind are counted, for a kernel ``[d_in, d_out]``.

        Raises:
          JpruneError: there are none; so it is by default.
        """
        raise JpruneError(f"{self} has no sparser and denser patterns to choose from, so all blocks must have it")

    def with_zeros(self, steps: int, d_in: int, d_out: int) -> "Pattern":
        """The pattern of this kind with so many steps of zeros in a kernel ``[d_in, d_out]``; see `steps`.

        Raises:
          JpruneError: a pattern has `steps` and not this.
        """
        raise JpruneError(f"{self} is counted in `steps`; its class must define `with_zeros` too, to be shared out")

    def json(self) -> Any:
        """The pattern as records and recipe files have it; `from_json` reads it."""
        return {"pattern": type(self).__name__, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, text: str) -> "Pattern | None":
        """The pattern that a text stands for; None if the text is not written in this pattern's `form`."""
        return None


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """Keeps `n` of every `m` consecutive inputs of each output."""

    form = "N:M (as 2:4)"
    n: int
    m: int

    def __post_init__(self):
        if not (0 < self.n < self.m):
            raise JpruneError(f"a pattern N:M keeps N of every M inputs, with 0 < N < M; got {self.n}:{self.m}")

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.n / self.m

    def check(self, d_in: int, where: str = "kernel") -> None:
        """Raises `JpruneError` unless groups of m fill `d_in` exactly."""
        if d_in % self.m:
            fits = [m for m in (4, 8, 16, 32) if d_in % m == 0]
            hint = f"patterns with M in {fits} fit" if fits else "use an unstructured sparsity there"
            raise JpruneError(f"{where}: {self} needs a number of inputs divisible by {self.m}, it has {d_in}; {hint}")

    def zeros(self, d_in: int, d_out: int) -> int:
        """Exact number of zeros in a kernel ``[d_in, d_out]``."""
        return d_in // self.m * (self.m - self.n) * d_out

    def select(self, scores, keep=None):
        """The mask that keeps the n highest scores of every group."""
        self.check(len(scores))
        mask = _keep_n_of_m(scores if keep is None else jnp.where(keep, scores, -jnp.inf), self.n, self.m)
        return mask if keep is None else mask & keep

    def schedule(self, d_in: int, d_out: int, block: int) -> Schedule:
        """Slices of m inputs, whatever the block."""
        self.check(d_in)
        return Schedule(self.m, (self.m - self.n,) * (d_in // self.m), per_output=True, grouped=True)

    def steps(self, d_in: int, d_out: int) -> Steps:
        """The zeros of every group; of 8, two more or less than the pattern has (OWL's mixed N:8)."""
        if self.m != MIXED:
            raise JpruneError(
                f"blocks differ in N:{MIXED} only: groups of {self.m} leave too few steps between {self} and others; "
                f"use N:{MIXED} (as 4:8), an unstructured sparsity, or the uniform allocation"
            )
        zeros = self.m - self.n
        return Steps(zeros, max(zeros - 2, 1), min(zeros + 2, self.m - 1), self.m, d_in // self.m * d_out)

    def with_zeros(self, steps: int, d_in: int, d_out: int) -> "NM":
        """Groups of m inputs, of which `steps` are zero."""
        return NM(self.m - steps, self.m)

    def holds(self, matrix: np.ndarray) -> bool:
        """Whether the zeros of ``[d_in, d_out]`` satisfy the pattern: no group has more than n others."""
        if len(matrix) % self.m:
            return False
        return bool((np.count_nonzero(matrix.reshape(-1, self.m, matrix.shape[1]), axis=1) <= self.n).all())

    def json(self) -> str:
        """``"2:4"``."""
        return str(self)

    @classmethod
    def read(cls, text: str) -> "Pattern | None":
        """Reads ``"2:4"``."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere: `sparsity` of the elements, chosen among the elements of each `per`.

    Attributes:
      sparsity: share of zeros, in [0, 1), as it is written: 0.29 of 100 are 29 (see `jprune.counts`).
      per: where scores compete. "output": among the d_in inputs of one output, so that every output loses exactly
        floor(d_in x sparsity). "block": among all outputs of 128 consecutive inputs. "kernel": in the whole kernel.
        None leaves it to the method, which takes what its authors took: magnitude "kernel", Wanda "output",
        SparseGPT "block".
    """

    form = "a sparsity (as 0.5)"
    sparsity: float
    per: Scope | None = None

    def __post_init__(self):
        if not (isinstance(self.sparsity, int | float) and 0 <= self.sparsity < 1):
            raise JpruneError(f"sparsity must be in [0, 1): the share of zeros; got {self.sparsity!r}")
        if self.per not in (None, "output", "block", "kernel"):
            raise JpruneError(f'per must be "output", "block" or "kernel"; got {self.per!r}')

    @property
    def by_input(self) -> bool:
        """Whether it matters which axes of a kernel are its inputs: only where outputs are pruned alike."""
        return self.per == "output"

    def among(self, per: Scope) -> "Unstructured":
        """This pattern with `per` filled in where it was left open."""
        return self if self.per else dataclasses.replace(self, per=per)

    def zeros(self, d_in: int, d_out: int) -> int:
        """Exact number of zeros in a kernel ``[d_in, d_out]``."""
        if self.per == "output":
            return counts.floor(d_in, self.sparsity) * d_out
        return counts.floor(d_in * d_out, self.sparsity)

    def select(self, scores, keep=None):
        """The mask that prunes the lowest scores of each output, which an open `per` stands for, or of the kernel."""
        d_in, d_out = scores.shape
        pattern = self.among("output")
        match pattern.per:
            case "output" | "kernel" as per:
                count = pattern.zeros(d_in, 1 if per == "output" else d_out)
                return _without_lowest(scores, count, per=per, keep=keep)
            case _:
                raise JpruneError(
                    'per="block" is for SparseGPT, which sees a kernel block by block; use "output" or "kernel"'
                )

    def schedule(self, d_in: int, d_out: int, block: int) -> Schedule | None:
        """The share of every block, rounded so that the sum over blocks is exact; None for the whole kernel."""
        if self.per == "kernel":
            return None
        width = 1 if self.per == "output" else d_out
        ends = [counts.floor(min(i * block, d_in) * width, self.sparsity) for i in range(-(-d_in // block) + 1)]
        return Schedule(block, tuple(b - a for a, b in itertools.pairwise(ends)), per_output=self.per == "output")

    def steps(self, d_in: int, d_out: int) -> Steps:
        """Single elements, up to 95 % of them; of whole outputs where each has as many, as an open `per` may mean."""
        by_output = self.among("output").by_input
        count, each = (d_in, d_out) if by_output else (d_in * d_out, 1)
        zeros = counts.floor(count, self.sparsity)
        return Steps(zeros, 0, max(zeros, counts.floor(count, SPARSEST)), count, each)

    def with_zeros(self, steps: int, d_in: int, d_out: int) -> "Unstructured":
        """The sparsity of so many elements, or of so many inputs of each output."""
        count = d_in if self.among("output").by_input else d_in * d_out
        return dataclasses.replace(self, sparsity=counts.share(steps, count))

    def json(self) -> dict[str, Any]:
        """``{"sparsity": 0.5, "per": null}``."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, text: str) -> "Pattern | None":
        """Reads ``"0.5"``."""
        try:
            sparsity = float(text)
        except ValueError:
            return None
        return None if math.isnan(sparsity) else cls(sparsity)

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} %" + (f" per {self.per}" if self.per else "")


def known(pattern: object) -> Pattern:
    """The pattern as it is.

    Raises:
      JpruneError: it is none.
    """
    if isinstance(pattern, Pattern):
        return pattern
    raise JpruneError(
        f"a pattern is Unstructured(0.5), NM(2, 4) or another jprune.patterns.Pattern; got {type(pattern).__name__} "
        f"{str(pattern)[:40]!r}; patterns.parse reads texts"
    )


def parse(text: str) -> Pattern:
    """Reads ``"2:4"`` as `NM` and ``"0.5"`` as `Unstructured`.

    Raises:
      JpruneError: the text is neither, or its numbers are out of range.
    """
    kinds = [kind for kind in Pattern.__subclasses__() if kind.form]
    for kind in kinds:
        if (pattern := kind.read(text)) is not None:
            return pattern
    *forms, last = (kind.form for kind in kinds)
    raise JpruneError(f"pattern {text!r} is neither {', '.join(map(str, forms))} nor {last}")


def from_json(value: Any) -> Pattern:
    """The pattern that a record or a recipe file has: a text, a number, or a table of a pattern's fields.

    Raises:
      JpruneError: it is no pattern, or its numbers are out of range.
    """
    if not isinstance(value, Mapping):
        return parse(str(value))
    fields = {name: field for name, field in value.items() if name != "pattern"}
    wanted = value.get("pattern", Unstructured.__name__)
    for kind in Pattern.__subclasses__():
        if kind.__name__ == wanted and fields.keys() <= {field.name for field in dataclasses.fields(kind)}:
            try:
                return kind(**fields)
            except TypeError:  # a field that must be given is not
                break
    raise JpruneError(f"no pattern has the fields {dict(value)}; a sparsity is {{'sparsity': 0.5}}, and N:M is '2:4'")


def satisfied(matrix: np.ndarray) -> list[str]:
    """The patterns among 1:2, 1:4, 2:4 and 4:8 that the zeros of ``[d_in, d_out]`` satisfy; none if there are none."""
    if not trees.count_zeros(matrix):
        return []
    return [str(pattern) for pattern in (NM(1, 2), NM(1, 4), NM(2, 4), NM(4, 8)) if pattern.holds(matrix)]
