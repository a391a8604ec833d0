"""What becomes of every parameter of a function: no leaf without an account."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from jprune.trace.jaxpr import PyTree, Trace, trace
from jprune.trace.matmuls import ParamMatmul, Skipped, find

State = Literal["prunable", "skipped", "other", "never read"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A parameter leaf, and every use of it."""

    path: str
    shape: tuple[int, ...]
    share: float
    """Its elements / all parameters."""
    matmuls: tuple[ParamMatmul, ...]
    """Those that `jprune.matmuls` lists: they are all of its uses, or there are none."""
    skipped: tuple[Skipped, ...]
    """Matmuls that cannot be listed, with the reason and the line."""
    others: tuple[str, ...]
    """Other uses (a bias is added, a row looked up), with their lines."""
    read: float
    """Share of its elements that something reads; what `matmuls` has no part of is not read."""

    @property
    def state(self) -> State:
        """What becomes of it."""
        if self.matmuls:
            return "prunable"
        if self.skipped:
            return "skipped"
        return "other" if self.others else "never read"

    def json(self) -> dict[str, Any]:
        """All fields, with what follows from them."""
        matmuls = [
            {
                "stage": m.stage,
                "in_axes": list(m.in_axes),
                "out_axes": list(m.out_axes),
                "batch_axes": list(m.batch_axes),
                "part": None if m.part is None else [list(cut) for cut in m.part],
                "shape": None if m.shape is None else list(m.shape),
            }
            for m in self.matmuls
        ]
        return {
            "path": self.path,
            "shape": list(self.shape),
            "share": self.share,
            "state": self.state,
            "matmuls": matmuls,
            "skipped": [{"reason": s.reason, "source": s.source} for s in self.skipped],
            "others": list(self.others),
            "read": self.read,
        }

    def __str__(self) -> str:
        words = f"{self.path} {list(self.shape)} ({100 * self.share:.3g} %): "
        if self.matmuls:
            words += "; ".join(dict.fromkeys(_words(m) for m in self.matmuls))
            return words if self.read == 1 else f"{words}; {100 * (1 - self.read):.3g} % of it is never read"
        if self.skipped:
            return words + "; ".join(dict.fromkeys(f"skipped: {s.reason}, at {s.source}" for s in self.skipped))
        return words + ("; ".join(self.others) or "never read")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """An account of every parameter of a function; print it, or take its `json`."""

    leaves: tuple[Leaf, ...]
    """In the order of the tree."""
    parameters: int
    """Elements of all leaves."""

    def share(self, state: State) -> float:
        """Share of the parameters that are in leaves of this state."""
        return sum(leaf.share for leaf in self.leaves if leaf.state == state)

    def json(self) -> dict[str, Any]:
        """Numbers and words only."""
        states: tuple[State, ...] = ("prunable", "skipped", "other", "never read")
        return {
            "parameters": self.parameters,
            "shares": {state: self.share(state) for state in states},
            "leaves": [leaf.json() for leaf in self.leaves],
        }

    def __str__(self) -> str:
        titles: dict[State, str] = {
            "prunable": "read by matmuls that can be observed and pruned",
            "skipped": "read by matmuls that cannot be followed",
            "other": "of other use",
            "never read": "never read",
        }
        lines = [f"{self.parameters} parameters in {len(self.leaves)} leaves"]
        for state, title in titles.items():
            own = [leaf for leaf in self.leaves if leaf.state == state]
            if own:
                lines.append(f"{100 * self.share(state):.3g} % {title}:")
                lines += [f"  {leaf}" for leaf in own]
        return "\n".join(lines)


def report(f: Callable, params: PyTree, *args: PyTree, **kwargs: PyTree) -> Report:
    """What becomes of every parameter in ``f(params, *args, **kwargs)``.

    Each leaf is in one of four states: prunable (all its uses are matmuls that `matmuls` lists), skipped (a matmul
    reads it in a way that cannot be followed; the reason and the line are there), other (biases, scales, embeddings
    that are looked up in), or never read.

    Args:
      f: any traceable function.
      params: its parameters: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
      *args: its other arguments, likewise; what is no array is handed to f as it is. Nothing is computed.
      **kwargs: other arguments of f, likewise.

    Raises:
      JpruneError: f cannot be traced.
    """
    return of_trace(trace(f, params, *args, **kwargs))


def of_trace(flat: Trace) -> Report:
    """The account of a function that has been traced."""
    found = find(flat)
    total = sum(math.prod(x.aval.shape) for x in flat.params.values())
    leaves = []
    for path, x in flat.params.items():
        matmuls = tuple(s.matmul for s in found.sites if s.matmul.path == path)
        skipped = tuple(s for s in found.skipped if path in s.paths)
        ends = [e for e in found.ends if path in e.paths and e.product is None and not e.skipped]
        size = math.prod(x.aval.shape)
        used = bool(matmuls or skipped or ends)
        leaves.append(
            Leaf(
                path=path,
                shape=tuple(x.aval.shape),
                share=size / max(1, total),
                matmuls=matmuls,
                skipped=skipped,
                others=tuple(dict.fromkeys(f"{e.what} at {e.source}" if e.source else e.what for e in ends)),
                read=_read(matmuls, size) if matmuls else float(used),
            )
        )
    return Report(leaves=tuple(leaves), parameters=total)


def _read(matmuls: tuple[ParamMatmul, ...], size: int) -> float:
    """The share of a leaf that its matmuls read; their parts are the same or do not overlap."""
    parts = {m.part for m in matmuls}
    if None in parts or size == 0:
        return 1.0
    return sum(math.prod(stop - start for start, stop in part) for part in parts if part) / size


def _words(m: ParamMatmul) -> str:
    where = "" if m.part is None else f" of {m.place.key.removeprefix(m.path)}"
    where += "" if m.shape is None else f" as {list(m.shape)}"
    stack = f", a stack along {list(m.batch_axes)}" if m.batch_axes else ""
    return f"stage {m.stage}: inputs {list(m.in_axes)}, outputs {list(m.out_axes)}{where}{stack}"
