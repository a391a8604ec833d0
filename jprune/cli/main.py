"""Entry of the `jprune` command: finds the subcommand, parses its dataclass, runs it, and reports errors in a line.

Exit status: 0 when the job is done, 1 when it failed, 2 for bad usage, 130 when interrupted.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from jprune.cli import commands, recipes
from jprune.cli.loraprune import PruneWithLoRA
from jprune.cli.prune import Prune
from jprune.cli.prune_and_tune import PruneAndTune
from jprune.cli.shear import Shear
from jprune.cli.shrink import GroupsOf, LLMPrunerOptions, Shrink, ShrinkTo
from jprune.cli.tune import Tune
from jprune.errors import JpruneError, UsageError
from jprune.methods import METHODS
from jprune.paths import compiled_folder
from jprune.runs import processes
from jprune.structured import DropLayers
from jprune.tuning.loraprune import LoRAPrune
from jprune.tuning.recovery import TUNINGS
from jprune.tuning.shearing import Shearing


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jprune` with the given words (by default those of the process) and returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    _keep_compiled_programs()
    try:
        name, rest = _find(words)
        command = _parse(name, rest)
        with command.begun():
            result = command.run()
            if command.json:
                print(json.dumps(result), flush=True)
    except UsageError as error:
        return _fail(error, 2)
    except JpruneError as error:
        return _fail(error, 1)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted; {error or 'nothing was written'}", 130)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if (gone := processes.lost(error)) is not None:
            return _fail(gone, 1)
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail("out of memory: use fewer --samples, a shorter --sequence-length, or --dtype bfloat16", 1)
    return 0


def _commands() -> dict[str, type]:
    """Every command by its words."""
    prune = {f"prune {name}": _by_method(Prune, method) for name, method in METHODS.items()}
    return prune | {
        "prune prune-and-tune": PruneAndTune,
        "prune llm-pruner": _by_method(ShrinkTo, LLMPrunerOptions),
        "prune layers": _by_method(Shrink, DropLayers),
        "prune loraprune": _by_method(PruneWithLoRA, LoRAPrune),
        "prune shearing": _by_method(Shear, Shearing),
        **{f"tune {name}": _by_method(Tune, kind) for name, kind in TUNINGS.items()},
        "eval perplexity": commands.EvalPerplexity,
        "generate": commands.Generate,
        "convert": commands.Convert,
        "info": commands.Info,
        "groups": GroupsOf,
    }


def _with_options(command: type, doc: str | None = None, **parts: type) -> type:
    """The command with the options of its parts, by field, among its own; the help begins with `doc`."""
    made = dataclasses.make_dataclass(
        f"{command.__name__}{''.join(part.__name__ for part in parts.values())}",
        [(name, Annotated[part, tyro.conf.arg(name="")], dataclasses.field()) for name, part in parts.items()],
        bases=(command,),
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = doc
    return made


def _by_method(command: type, method: type) -> type:
    """A command whose help says what its method does."""
    return _with_options(command, method.__doc__, method=method)


def _find(words: list[str]) -> tuple[str, list[str]]:
    """The command that the first words name, and the words after them."""
    known = _commands()
    for count in (2, 1):
        if (name := " ".join(words[:count])) in known:
            return name, words[count:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(known))
        raise SystemExit(0 if words else 2)
    first = words[0]
    below = [name.split()[1] for name in known if name.startswith(f"{first} ")]
    if not below:
        raise UsageError(f"unknown command {first!r}; commands: {', '.join(known)}")
    if len(words) > 1 and words[1] not in ("-h", "--help"):
        what = "method" if first == "prune" else "task"
        raise UsageError(f"unknown {what} {words[1]!r}; `jprune {first}` has: {', '.join(below)}")
    print(_overview({name: kind for name, kind in known.items() if name.startswith(f"{first} ")}))
    raise SystemExit(0 if len(words) > 1 else 2)


def _overview(known: dict[str, type]) -> str:
    width = max(map(len, known)) + 2
    lines = [f"  {name:{width}}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in known.items()]
    return "\n".join(["usage: jprune COMMAND ... (each has --help)", "", *lines])


def _parse(name: str, words: list[str]) -> Any:
    """The command's dataclass, filled in from a recipe file, if one is named, and then from the words."""
    recipe = _value_of("--recipe", words)
    if recipe is not None:
        words = recipes.as_words(Path(recipe), name.split()[-1], words) + words
    kind = _commands()[name]
    if kind is PruneAndTune:  # what the words say of its parts decides which options there are
        pruner = METHODS.get(_value_of("--pruner", words) or "", METHODS[PruneAndTune.pruner])
        tuning = TUNINGS.get(_value_of("--tuning", words) or "", TUNINGS[PruneAndTune.tuning])
        kind = _with_options(kind, kind.__doc__, pruner_options=pruner, tuning_options=tuning)
    return tyro.cli(
        kind,
        args=words,
        prog=f"jprune {name}",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _value_of(flag: str, words: list[str]) -> str | None:
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def _keep_compiled_programs() -> None:
    """Compiled programs are kept in the user's cache, unless the user has said where; a second run compiles nothing."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(compiled_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def _fail(error: object, status: int) -> int:
    print(f"jprune: {error}", file=sys.stderr)
    return processes.exit_now(status)
