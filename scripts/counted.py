"""What compiled programs do, counted: operations of a device and bytes between devices, read from their HLO.

`Counted()` is a context in which every program that JAX runs is noted, also the small ones of eager operations, and
every `jax.device_put` of an array that is on devices. To see each call, it keeps JAX from dispatching in C++: these are
private functions of JAX, so another version may need other words here; `tests/faults/scripts` would say so.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop runs, which the HLO says of
most. Of the others: one with a matmul in it is a triangular one within a loop (half of that one's rounds), one with a
factorisation ends with the first that succeeds, and all others are searches for a threshold (`SEARCH` rounds). Of the
two branches of a condition the cheaper counts: conditions here are for ties. Of several each is taken as often as the
others: these are matmuls of different lengths.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import pjit
from jax._src.interpreters import pxla

SEARCH = 16
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_ELEMENTWISE = re.compile(
    "abs|add|and|clamp|compare|cosine|divide|exponential|exponential-minus-one|is-finite|log|logistic|maximum|minimum|"
    "multiply|negate|not|or|power|remainder|rsqrt|select|shift-left|shift-right-logical|sign|sine|sqrt|subtract|tanh|xor"
)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device."""

    flops: Counter[str] = dataclasses.field(default_factory=Counter)
    """By kind: "gram", "matmul", "factorise", "elements" (arithmetic on each element, and sums)."""
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    """Bytes that it sends, by kind of collective, if devices pass them on in a ring."""
    messages: int = 0

    def times(self, count: float) -> "Work":
        """So many times this."""
        flops, sent = ({key: value * count for key, value in kind.items()} for kind in (self.flops, self.sent))
        return Work(Counter(flops), Counter(sent), round(self.messages * count))

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.sent + other.sent, self.messages + other.messages)


class Program:
    """A compiled module, by its text."""

    def __init__(self, text: str):
        self._lines: dict[str, list[re.Match[str]]] = {}
        self.entry = ""
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                name = head[2]
                self._lines[name] = []
                self.entry = name if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                self._lines[name].append(found)

    @functools.cached_property
    def work(self) -> Work:
        """Of one run on one device."""
        return self._of(self.entry, 1)

    def _of(self, name: str, rounds: float) -> Work:
        """Of one computation; rounds: of the loop that it is the body of."""
        types = {line[2]: line[3] for line in self._lines[name]}
        total = Work()
        for _, _, kind, op, rest in (line.groups() for line in self._lines[name]):
            called = _CALLED.findall(rest)
            if op == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
                trips = int(known[1]) if known else self._trips(called[0], rounds)
                total += self._of(called[0], trips).times(trips)
            elif op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
                called = re.findall(r"[\w.\-]+", branches[1]) if branches else called
                works = [self._of(each, 1) for each in called]
                if len(works) > 2:
                    total += functools.reduce(Work.__add__, works).times(1 / len(works))
                else:
                    total += min(works, key=lambda work: sum(work.flops.values()))
            elif op in ("fusion", "call"):
                total += functools.reduce(Work.__add__, (self._of(each, rounds) for each in called))
            else:
                total += _work(kind, op, rest, types)
        return total

    def _trips(self, body: str, rounds: float) -> float:
        """Rounds of a loop whose number is not in the HLO."""
        found = self._of(body, 1).flops
        return (rounds - 1) / 2 if found["matmul"] else 1 if found["factorise"] else SEARCH


def _work(kind: str, op: str, rest: str, types: dict[str, str]) -> Work:
    """Of one instruction with the type `kind`."""
    operands = [types.get(each, "") for each in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
    if op == "dot":
        return Work(Counter(_dot(kind, rest, operands[0])))
    if op == "custom-call" and "potrf" in rest:
        *batch, n, _ = _sizes(kind)[0][1]
        return Work(Counter(factorise=math.prod(batch) * n**3 / 3))
    if op == "custom-call" and "trsm" in rest:
        return Work(Counter(factorise=_elements(kind) * _sizes(operands[0])[0][1][-1]))
    if _ELEMENTWISE.fullmatch(op):
        return Work(Counter(elements=_elements(kind)))
    if op in ("reduce", "reduce-window"):
        return Work(Counter(elements=_elements(operands[0])))
    name = op.removesuffix("-start")
    if name in _COLLECTIVES:
        n, size = _group(rest), sum(math.prod(shape) * _BYTES.get(dtype, 4) for dtype, shape in _sizes(kind))
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}.get(name, (n - 1) / n)
        return Work(sent=Counter({name: share * size}), messages=1)
    return Work()


def _dot(kind: str, rest: str, left: str) -> dict[str, float]:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    sizes = _sizes(left)[0][1]
    contracted = math.prod(sizes[int(axis)] for axis in axes[1].split(",")) if axes and axes[1] else 1
    flops = 2.0 * _elements(kind) * contracted
    counts = min(_sizes(kind)[0][1], default=1) == 1  # a row of ones that adds up columns
    return {"elements" if counts else "gram" if "jit(gram)" in rest else "matmul": flops}


def _sizes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array in a type."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", kind)
    return [(dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in found]


def _elements(kind: str) -> int:
    return math.prod(_sizes(kind)[0][1])


def _group(rest: str) -> int:
    """How many devices exchange something with each other."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 2  # a permutation names pairs


class Counted(contextlib.AbstractContextManager):
    """Notes what JAX runs.

    Attributes:
      programs: name, text, number of devices and of runs of every compiled program.
      puts: bytes by kind: "copies" of what lies on one device to another, and what goes "through the host", because it
        lies otherwise where it is to be.
    """

    def __init__(self) -> None:
        self.puts: Counter[str] = Counter()
        self._runs: Counter[int] = Counter()
        self._executables: dict[int, tuple[str, Any]] = {}

    @property
    def programs(self) -> Iterator[tuple[str, str, int, int]]:
        """What ran."""
        for key, (name, executable) in self._executables.items():
            text = executable.hlo_modules()[0].to_string()
            yield re.sub(r"^jit\((\w*)\)$", r"\1", name), text, len(executable.local_devices()), self._runs[key]

    def __enter__(self) -> "Counted":
        call, put = pxla.ExecuteReplicated.__call__, jax.device_put

        def noted(this: Any, *args: Any) -> Any:
            key = id(this.xla_executable)
            self._executables[key] = this.name, this.xla_executable
            self._runs[key] += 1
            return call(this, *args)

        self._undo: tuple[Callable, Callable, Callable] = pjit._get_fastpath_data, call, put
        jax.clear_caches()  # what has a way in C++ would go it
        pjit._get_fastpath_data = lambda *args: None
        pxla.ExecuteReplicated.__call__ = noted
        jax.device_put = functools.partial(self._put, put)
        return self

    def __exit__(self, *exc: object) -> None:
        pjit._get_fastpath_data, pxla.ExecuteReplicated.__call__, jax.device_put = self._undo

    def _put(self, put: Callable, x: Any, device: Any = None, **options: Any) -> Any:
        result = put(x, device, **options)
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable:
            here = {shard.device: shard.index for shard in x.addressable_shards}
            missing = [s.data.nbytes for s in result.addressable_shards if here.get(s.device) != s.index]
            self.puts["copies" if len(here) == 1 else "through the host"] += sum(missing)
        return result
