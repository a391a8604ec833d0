"""From a command's dataclass to flags, and from words back to the command.

A field of a command is a flag. A field whose type is a dataclass is a part, whose fields are flags of the command: so
the options of `jprune.pipeline.options` and of the methods stand once, where they are, and know of no command line.
`Flags` says which fields of a part a command shows, and `Word` how a field is typed where its type does not say.

tyro sees one flat dataclass of words. What they make is made afterwards, and so what a dataclass refuses is told like
any other error.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import operator
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union

import tyro

M = TypeVar("M")
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Word:
    """How a field is typed, and what its words become; in its annotation, or in the table of all commands."""

    flag: str | None = None
    """Name of the flag, with underscores, if not that of the field."""
    type: Any = None
    """What tyro reads, if not the field's type."""
    default: Any = ...
    """Default, if not the field's (...)."""
    aliases: tuple[str, ...] = ()
    looks: str = ""
    """What its words look like, said before its help."""
    made: Callable[[str, Any], Any] | None = None
    """(flag, words, or what a recipe file has) -> the field's value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Which fields of a part are flags of a command; in the annotation of the part."""

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    prefix: str = ""
    """Of the flags' names."""
    of: type | None = None
    """The dataclass of a part that stays a mapping, because it is not always wanted."""
    words: Mapping[str, Word] = dataclasses.field(default_factory=dict)
    """How fields are typed in this command."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One option of a command."""

    part: str | None
    """The field of the command that it is a field of; None if it is the command's own."""
    field: str
    """Its name in Python."""
    name: str
    """Its name as a flag, with underscores."""
    type: Any
    default: Any
    help: str
    word: Word

    @property
    def typed(self) -> str:
        """How it is typed."""
        return dashed(self.name)


def dashed(name: str) -> str:
    """A name as a flag."""
    return f"--{name.replace('_', '-')}"


class Form:
    """The flags of a command.

    Args:
      command: its class.
      known: how fields are typed in all commands, by their names.
      description: what its help begins with, if not the class's docstring.
      parts: the classes of parts for which the command's own class is too general, such as the method.
    """

    def __init__(
        self, command: type, known: Mapping[str, Word], description: str | None = None, parts: Mapping[str, Any] = {}
    ):
        self.command, self.description = command, description or command.__doc__ or ""
        self._parts: dict[str, type | None] = {}
        flags: list[Flag] = []
        hints = typing.get_type_hints(command, include_extras=True)
        for field in dataclasses.fields(command):
            hint = hints[field.name]
            marks = _mark(hint, Flags) or Flags()
            kind = parts.get(field.name) or marks.of or (typing.get_args(hint)[0] if _is_marked(hint) else hint)
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
                flags.append(_flag(field, None, hint, _docs(command), marks, {}))
                continue
            self._parts[field.name] = None if marks.of else kind
            inner = typing.get_type_hints(kind, include_extras=True)
            flags += [
                _flag(each, field.name, inner[each.name], _docs(kind), marks, known)
                for each in dataclasses.fields(kind)
                if (not marks.only or each.name in marks.only) and each.name not in marks.without
            ]
        self.flags = {flag.name: flag for flag in flags}

    def find(self, name: str) -> Flag | None:
        """The flag of a name in Python, or of a flag's or its alias's name, with underscores or dashes."""
        name = name.removeprefix("--").replace("-", "_")
        for flag in self.flags.values():
            if name in (flag.name, *(alias.removeprefix("--").replace("-", "_") for alias in flag.word.aliases)):
                return flag
        return next((flag for flag in self.flags.values() if flag.field == name), None)

    def given(self, words: Sequence[str]) -> set[str]:
        """The names of the flags that are among words."""
        found = [self.find(word.split("=")[0]) for word in words if word.startswith("--")]
        return {flag.name for flag in found if flag is not None}

    def parse(self, words: Sequence[str], *, prog: str, recipe: Mapping[str, Any] | None = None) -> Any:
        """The command that words make, with the values of a recipe for the flags that they do not give.

        Raises:
          UsageError: words that do not fit together.
          JpruneError: what a part refuses.
        """
        given = self.given(words)
        recipe = {name: value for name, value in (recipe or {}).items() if name not in given}
        typed: Any = tyro.cli(
            dataclasses.make_dataclass(
                "Words", [self._word(flag, recipe) for flag in self.flags.values()], kw_only=True
            ),
            args=_joined(words),
            prog=prog,
            description=self.spelled(self.description),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        own: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {name: {} for name in self._parts}
        for flag in self.flags.values():
            if flag.name in recipe:
                value = recipe[flag.name]
            else:
                value = getattr(typed, flag.name)
                value = value if flag.word.made is None else flag.word.made(flag.typed, value)
            (own if flag.part is None else parts[flag.part])[flag.field] = value
        for name, kind in self._parts.items():
            own[name] = parts[name] if kind is None else kind(**parts[name])
        return self.command(**own)

    def spelled(self, text: str) -> str:
        """A text of the library in the words of the command line: the `names` of options, also of others, as flags."""

        def flag(found: re.Match[str]) -> str:
            named = self.find(found[1])
            return dashed(found[1]) if named is None else named.typed

        return re.sub(r"`([a-z]\w*)`", flag, text)

    def _word(self, flag: Flag, recipe: Mapping[str, Any]) -> tuple[str, Any, Any]:
        """The field that tyro sees."""
        default = flag.default
        if flag.name in recipe:  # what is made of words is put in later; then any default will do
            default = recipe[flag.name] if flag.word.made is None or default is MISSING else default
        shown = tyro.conf.arg(help=self.spelled(flag.help), aliases=flag.word.aliases)
        return flag.name, Annotated[flag.type, shown], dataclasses.field(default=default)


def _joined(words: Sequence[str]) -> list[str]:
    """The words, with one that has a space in it as part of the flag before it: it is a text, even if it begins with
    dashes as flags do."""
    found: list[str] = []
    for word in words:
        if " " in word and word.startswith("-") and found and re.fullmatch("--[a-z-]+", found[-1]):
            found[-1] = f"{found[-1]}={word}"
        else:
            found.append(word)
    return found


def keywords(command: Any, *parts: str) -> dict[str, Any]:
    """The options of some parts that a command shows, by their names in Python."""
    kind: type = type(command)
    found: dict[str, Any] = {}
    for flag in _shown(kind):
        if flag.part in parts:
            part = getattr(command, flag.part)
            found[flag.field] = part[flag.field] if isinstance(part, Mapping) else getattr(part, flag.field)
    return found


@functools.cache
def _shown(command: type) -> tuple[Flag, ...]:
    return tuple(Form(command, {}).flags.values())


def _is_marked(hint: Any) -> bool:
    return typing.get_origin(hint) is Annotated


def _mark(hint: Any, kind: type[M]) -> M | None:
    """The mark of a kind in an annotation."""
    marks = typing.get_args(hint)[1:] if _is_marked(hint) else ()
    return next((mark for mark in marks if isinstance(mark, kind)), None)


def _flag(
    field: dataclasses.Field,
    part: str | None,
    hint: Any,
    docs: Mapping[str, str],
    marks: Flags,
    known: Mapping[str, Word],
) -> Flag:
    word = marks.words.get(field.name) or known.get(field.name) or _mark(hint, Word) or Word()
    default = field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    if word.default is not ...:
        default = word.default
        if default is not None and word.type is None:
            hint = _without_none(hint)
    return Flag(
        part=part,
        field=field.name,
        name=word.flag or f"{marks.prefix}{field.name}",
        type=hint if word.type is None else word.type,
        default=default,
        help=f"{word.looks}. {docs.get(field.name, '')}".removeprefix(". "),
        word=word,
    )


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint
    return functools.reduce(operator.or_, (each for each in typing.get_args(hint) if each is not type(None)))


@functools.cache
def _docs(kind: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, by name."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each):
            body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body  # type: ignore[attr-defined]
            for line, after in itertools.pairwise(body):
                match line, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = " ".join(text.split())
    return found
