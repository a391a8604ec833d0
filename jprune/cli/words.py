"""Words of the command line that are no field's type: patterns, targets, memory, and values by name.

A conversion takes the flag, for its errors, and the words; or what a recipe file has, which may be a table or a number.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jprune import patterns
from jprune.cli.flags import Repeated, Word
from jprune.errors import JpruneError, UsageError
from jprune.patterns import NM, Pattern, Scope, Unstructured

if TYPE_CHECKING:
    from jprune.structured.selection import Target

_NAMED = re.compile(r"^([\w.-]+)=(.+)$", re.DOTALL)
"""A path with "=" in the name of its file has a folder before it: ./a=b.txt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternWords:
    """What the zeros must look like."""

    sparsity: float | None = None
    """Share of zeros, in [0, 1)."""
    pattern: str | None = None
    """N:M, such as 2:4, keeps N of every M consecutive inputs; instead of `sparsity`."""
    per: Scope | None = None
    """Where weights compete for `sparsity`: among the inputs of each output, in blocks of 128 inputs, or in the whole
    kernel. By default as the method's authors do."""

    def made(self) -> Pattern:
        """The pattern.

        Raises:
          JpruneError: not exactly one of the two, or no pattern.
        """
        if (self.sparsity is None) == (self.pattern is None):
            raise UsageError("give either --sparsity S, such as 0.5, or --pattern N:M, such as 2:4")
        if self.sparsity is not None:
            return Unstructured(self.sparsity, self.per)
        pattern = patterns.parse(self.pattern or "")
        if not isinstance(pattern, NM):
            raise JpruneError(f"--pattern is N:M, such as 2:4; for a share of zeros give --sparsity {self.pattern}")
        if self.per is not None:
            raise UsageError(f"--per {self.per} goes with --sparsity; the pattern {pattern} is per output")
        return pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetWords:
    """How small a model is to become, for methods that are told so."""

    units: Annotated[float | None, Word(flag="ratio")] = None
    """Share of the units (heads, feed-forward channels or hidden dimensions) to remove, of each layer that is pruned,
    or with `globally` of all together."""
    share: Annotated[float | None, Word(flag="parameter_ratio")] = None
    """Share of all parameters of the model to remove, at least; instead of `units`."""
    parameters: int | None = None
    """Number of parameters to stay, at most; instead of `units`."""

    def made(self) -> "Target | None":
        """The target, if one is given.

        Raises:
          UsageError: several are.
        """
        from jprune.structured.selection import Target

        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) > 1:
            raise UsageError("give only one of --ratio, --parameter-ratio and --parameters")
        return Target(**given) if given else None


def overrides(flag: str, given: Any) -> dict[str, Pattern]:
    """Patterns by regular expression, of REGEX=PATTERN."""
    if isinstance(given, Mapping):
        return {regex: _pattern(flag, value) for regex, value in given.items()}
    result = {}
    for text in _texts(flag, given):
        regex, equals, pattern = text.rpartition("=")
        if not equals or not regex:
            raise UsageError(f"{flag} {text!r} is not REGEX=PATTERN, such as 'mlp/down=0.3' or 'blocks/0/=2:4'")
        result[regex] = patterns.parse(pattern)
    return result


def _pattern(flag: str, value: Any) -> Pattern:
    """A pattern as a recipe file or the record of a run has it."""
    if isinstance(value, Mapping):
        try:
            return Unstructured(**value)
        except TypeError:
            raise UsageError(f"{flag} {dict(value)} is no pattern; expected sparsity and per") from None
    return patterns.parse(str(value))


def allocating(flag: str, given: Any) -> Any:
    """How zeros are shared out, of a name with or without a band, or of what a record has."""
    from jprune.pipeline.recipe import allocation

    del flag
    allocation(given)
    return given if isinstance(given, str) else allocation(given)


def bytes_of_memory(flag: str, given: Any) -> int | None:
    """Bytes, of words such as 6GB."""
    from jprune.runs import memory

    del flag
    return None if given is None else memory.parse(str(given))


def sources(flag: str, given: Any) -> str | dict[str, str] | None:
    """One source, or sources by name; None if there are none."""
    if isinstance(given, Mapping):
        return {str(name): _text(flag, source) for name, source in given.items()}
    words = _texts(flag, given)
    named = [_NAMED.match(word) for word in words]
    if not any(named):
        if len(words) > 1:
            raise UsageError(f"{flag} is given {len(words)} times; name the domains: {flag} NAME={words[0]} ...")
        return words[0] if words else None
    if not all(named):
        plain = next(word for word, found in zip(words, named) if not found)
        raise UsageError(f"{flag} {plain} has no name, and others have: {flag} NAME={plain}")
    return _once(flag, [(found[1], found[2]) for found in named if found])


def mixed(flag: str, given: Any) -> str | dict[str, str] | None:
    """One source, or sources by name that stand in one word, separated by commas."""
    if isinstance(given, str) and _NAMED.match(given):
        given = tuple(part.strip() for part in re.split(r",(?=\s*[\w.-]+=)", given))
    return sources(flag, given)


def numbers(flag: str, given: Any) -> dict[str, float] | None:
    """Numbers by name, of words such as a=1,b=2; None if there are none."""
    if isinstance(given, Mapping):
        given = tuple(f"{name}={value}" for name, value in given.items())
    pairs = []
    for part in (part for word in _texts(flag, given) for part in word.split(",")):
        name, _, value = part.partition("=")
        try:
            pairs.append((name.strip(), float(value)))
        except ValueError:
            raise UsageError(f"{flag} is NAME=NUMBER,NAME=NUMBER,...; got {part!r}") from None
    return _once(flag, pairs) if pairs else None


def shares(flag: str, given: Any) -> tuple[float, ...] | None:
    """Numbers, of words such as 0.3,0.5; None if there are none."""
    words = given if isinstance(given, list | tuple) else [given]
    parts = [part.strip() for word in words for part in str(word).split(",")]
    try:
        return tuple(map(float, parts)) or None
    except ValueError:
        raise UsageError(f"{flag} {','.join(parts)} are not sparsities, such as 0.3,0.5,0.7") from None


def _texts(flag: str, given: Any) -> list[str]:
    return [_text(flag, word) for word in (given if isinstance(given, list | tuple) else [given])]


def _text(flag: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{flag} is text; got {value!r}")
    return value


def _once(flag: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise UsageError(f"{flag} names {name!r} twice")
        result[name] = value
    return result


_SOURCES = "SOURCE, or NAME=SOURCE for each domain"
WORDS: dict[str, Word] = {
    "calibration": Word(type=str, made=mixed),
    "calibration_proportions": Word(type=Repeated, default=(), looks="NAME=SHARE,...", made=numbers),
    "where": Word(type=Repeated),
    "skip": Word(type=Repeated),
    "overrides": Word(flag="override", type=Repeated, default=(), looks="REGEX=PATTERN", made=overrides),
    "allocate": Word(type=str, looks="NAME or NAME=BAND", made=allocating),
    "evaluate": Word(type=str | None),
    "memory": Word(type=str | None, looks="Such as 6GB", made=bytes_of_memory),
    "run": Word(type=Path | None),
    "data": Word(type=Repeated, default=(), looks=_SOURCES, made=sources),
    "proportions": Word(type=Repeated, default=(), looks="NAME=SHARE,...", made=numbers),
    "reference_losses": Word(flag="reference_loss", type=Repeated, default=(), looks="NAME=LOSS,...", made=numbers),
    "windows_at_most": Word(flag="windows"),
    # The authors' names for two options of LLM-Pruner.
    "importance": Word(aliases=("--taylor",)),
    "globally": Word(aliases=("--global",)),
}
"""Fields of parts, by name in Python, whose type does not say how they are typed."""
EVALUATE_DOMAINS = Word(type=Repeated, default=(), looks=_SOURCES, made=sources)
"""`evaluate` in commands that train."""
