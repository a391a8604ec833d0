"""Patterns: what the zeros of a pruned kernel must look like.

A pattern speaks of a kernel's matrix view ``[d_in, d_out]``. `Unstructured` asks for a share of zeros and says among
which elements scores compete; `NM` keeps n of every m consecutive inputs of each output (``2:4`` keeps 2 of 4).
"""

import dataclasses
import math
import re
from typing import Literal

from jprune.errors import JpruneError

Scope = Literal["output", "block", "kernel"]


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere: `sparsity` of the elements, chosen among the elements of each `per`.

    Attributes:
      sparsity: share of zeros, in [0, 1).
      per: where scores compete. "output": among the d_in inputs of one output, so that every output loses exactly
        floor(d_in x sparsity). "block": among all outputs of 128 consecutive inputs. "kernel": in the whole kernel.
        None leaves it to the method, which takes what its authors took: magnitude "kernel", Wanda "output",
        SparseGPT "block".
    """

    sparsity: float
    per: Scope | None = None

    def __post_init__(self):
        if not (isinstance(self.sparsity, int | float) and 0 <= self.sparsity < 1):
            raise JpruneError(f"sparsity must be in [0, 1): the share of zeros; got {self.sparsity!r}")
        if self.per not in (None, "output", "block", "kernel"):
            raise JpruneError(f'per must be "output", "block" or "kernel"; got {self.per!r}')

    def among(self, per: Scope) -> "Unstructured":
        """This pattern with `per` filled in where it was left open."""
        return self if self.per else dataclasses.replace(self, per=per)

    def check(self, d_in: int, where: str = "kernel") -> None:
        """Fits every kernel."""

    def zeros(self, d_in: int, d_out: int) -> int:
        """Exact number of zeros in a kernel ``[d_in, d_out]``."""
        return int(d_in * self.sparsity) * d_out if self.per == "output" else int(d_in * d_out * self.sparsity)

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} %" + (f" per {self.per}" if self.per else "")


@dataclasses.dataclass(frozen=True)
class NM:
    """Keeps `n` of every `m` consecutive inputs of each output."""

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

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


def parse(text: str) -> Pattern:
    """Reads ``"2:4"`` as `NM` and ``"0.5"`` as `Unstructured`.

    Raises:
      JpruneError: the text is neither, or its numbers are out of range.
    """
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        return NM(int(match[1]), int(match[2]))
    try:
        sparsity = float(text)
    except ValueError:
        sparsity = math.nan
    if math.isnan(sparsity):
        raise JpruneError(f"pattern {text!r} is neither N:M (as 2:4) nor a sparsity (as 0.5)")
    return Unstructured(sparsity)
