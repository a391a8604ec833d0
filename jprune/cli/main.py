"""Entry of the `jprune` command: finds the subcommand, makes it of its words, runs it, and reports errors in a line.

Exit status: 0 when the job is done, 1 when it failed, 2 for bad usage, 130 when interrupted, 141 when nobody reads
what it prints.

What is not needed is not imported: the overview knows methods by name, and a command's help only its own options.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jprune.cli import console
from jprune.errors import JpruneError, UsageError
from jprune.packages import missing
from jprune.pipeline.registry import AUTOMATIC, IN_ROUNDS, ONE_SHOT, PRUNERS, STRUCTURED, TRAINED, TUNERS, Methods

if TYPE_CHECKING:
    from jprune.cli.command import Told
    from jprune.cli.flags import Form

COMMANDS = Methods(
    {
        "eval perplexity": "jprune.cli.evaluate:EvalPerplexity",
        "eval tasks": "jprune.cli.tasks:EvalTasks",
        "compare": "jprune.cli.compare:Compare",
        "sweep": "jprune.cli.sweep:Sweep",
        "generate": "jprune.cli.generate:Generate",
        "convert": "jprune.cli.convert:Convert",
        "pack": "jprune.cli.pack:Pack",
        "info": "jprune.cli.info:Info",
        "groups": "jprune.cli.info:Groups",
    }
)
"""The commands that have no method."""
RUNNERS = Methods(
    {
        "one-shot": "jprune.cli.prune:Prune",
        "rounds": "jprune.cli.rounds:PruneAndTune",
        "shrink": "jprune.cli.shrink:Shrink",
        "shrink in parts": "jprune.cli.shrink:ShrinkInParts",
        "shrink to": "jprune.cli.shrink:ShrinkTo",
        "shrink while training": "jprune.cli.shrink:ShrinkWhileTraining",
        "tune": "jprune.cli.tune:Tune",
    }
)
"""The commands that run methods."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jprune` with the given words (by default those of the process) and returns its exit status."""
    console.prepare()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        with console.flushed():
            return _main(list(sys.argv[1:] if argv is None else argv))
    except console.Closed as closed:
        return _fail(closed, 1, None) if str(closed) else console.CLOSED


def _main(words: list[str]) -> int:
    form: Form | None = None
    try:
        name, rest = _find(words)
        recipe = _recipe(rest)
        form = _form(name, rest, recipe)
        command = _made(form, name, rest, recipe)
        _keep_compiled_programs()
        with command.begun():
            told = command.run()
            _tell(told, form, as_json=command.json)
            return told.status
    except JpruneError as error:
        return _fail(error, 2 if isinstance(error, UsageError) else 1, form)
    except ModuleNotFoundError as error:
        return _fail(missing(error, "this command"), 1, form)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted; {error or 'nothing was written'}", 130, form)
    except BrokenPipeError:
        raise  # nobody is there to be told
    except OSError as error:
        return _fail(f"the system refuses: {error}", 1, form)
    except (MemoryError, RuntimeError) as error:
        message = _explained(error)
        if message is None:
            raise
        return _fail(message, 1, form)


def _tell(told: "Told", form: "Form", *, as_json: bool) -> None:
    """Prints what a command has to say."""
    for notice in told.notices:
        print(form.spelled(notice), file=sys.stderr)
    if as_json:
        print(json.dumps(told.json), flush=True)
    else:
        told.show()


def _commands() -> dict[str, str]:
    """Every command by its words, and the first line of what it says of itself."""
    return {
        **{f"prune {n}": RUNNERS.summary("rounds") if n in IN_ROUNDS else PRUNERS.summary(n) for n in PRUNERS},
        **{f"tune {name}": TUNERS.summary(name) for name in TUNERS},
        **{name: COMMANDS.summary(name) for name in COMMANDS},
    }


def _find(words: list[str]) -> tuple[str, list[str]]:
    """The command that the first words name, and the words after them."""
    known = [*(f"prune {name}" for name in PRUNERS), *(f"tune {name}" for name in TUNERS), *COMMANDS]
    for count in (2, 1):
        if (name := " ".join(words[:count])) in known:
            return name, words[count:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(""))
        raise SystemExit(0 if words else 2)
    first = words[0]
    below = [name.split()[1] for name in known if name.startswith(f"{first} ")]
    if not below:
        raise UsageError(f"unknown command {first!r}; commands: {', '.join(known)}")
    if len(words) > 1 and words[1] not in ("-h", "--help"):
        what = "method" if first == "prune" else "task"
        raise UsageError(f"unknown {what} {words[1]!r}; `jprune {first}` has: {', '.join(below)}")
    print(_overview(f"{first} "))
    raise SystemExit(0 if len(words) > 1 else 2)


def _overview(start: str) -> str:
    known = {name: summary for name, summary in _commands().items() if name.startswith(start)}
    width = max(map(len, known)) + 2
    lines = [f"  {name:{width}}{summary}" for name, summary in known.items()]
    return "\n".join(["usage: jprune COMMAND ... (each has --help)", "", *lines])


def _form(name: str, words: Sequence[str] = (), recipe: dict[str, Any] | None = None) -> "Form":
    """The flags of a command; of prune-and-tune, which has those of its two parts, for the parts that are named."""
    from jprune.cli.flags import Form

    if name in COMMANDS:
        return Form(COMMANDS[name], {})
    from jprune.cli.words import WORDS

    group, method = name.split()
    if method in IN_ROUNDS:
        kind = RUNNERS["rounds"]
        pruner = _named("pruner", words, recipe, ONE_SHOT) or kind.pruner
        tuning = _named("tuning", words, recipe, TUNERS) or kind.tuning
        return Form(kind, WORDS, parts={"pruner_options": ONE_SHOT[pruner], "tuning_options": TUNERS[tuning]})
    if group == "tune":
        runner, methods = "tune", TUNERS
    elif method in (one_shot := AUTOMATIC | ONE_SHOT):
        runner, methods = "one-shot", one_shot
    elif method in TRAINED:
        runner, methods = "shrink while training", TRAINED
    else:
        runner, methods = {"layers": "shrink", "experts": "shrink in parts"}.get(method, "shrink to"), STRUCTURED
    return Form(RUNNERS[runner], WORDS, methods[method].__doc__, {"method": methods[method]})


def _made(form: "Form", name: str, words: list[str], recipe: dict[str, Any] | None) -> Any:
    """The command that words make, and a recipe file, if one is named."""
    values = None
    if recipe is not None:
        from jprune.cli import recipes

        path = Path(_value_of("--recipe", words) or "")
        values = recipes.values(recipe, path, name, form, form.given(words), _command_with)
    return form.parse(words, prog=f"jprune {name}", recipe=values)


def parse(name: str, words: list[str]) -> Any:
    """The command that words make."""
    recipe = _recipe(words)
    return _made(_form(name, words, recipe), name, words, recipe)


def _recipe(words: Sequence[str]) -> dict[str, Any] | None:
    """What stands in the recipe file, if words name one."""
    if (path := _value_of("--recipe", words)) is None:
        return None
    from jprune.cli import recipes

    return recipes.read(Path(path))


def _command_with(option: str) -> str | None:
    """The first command that has an option."""
    return next((name for name in _commands() if (_form(name)).find(option) is not None), None)


def _named(option: str, words: Sequence[str], recipe: dict[str, Any] | None, methods: Methods) -> str | None:
    """The method that an option names, if it is there and names one."""
    value = _value_of(f"--{option}", words) or (recipe or {}).get(option)
    return value if isinstance(value, str) and value in methods else None


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def _keep_compiled_programs() -> None:
    """Compiled programs are kept in the user's cache, unless the user has said where; a second run compiles nothing."""
    import jax

    from jprune.paths import compiled_folder

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(compiled_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def _explained(error: Exception) -> str | None:
    """What to tell of an error of the machine; None if it is none."""
    import jax

    from jprune.runs import processes

    if (gone := processes.lost(error)) is not None:
        return gone
    full = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if full or isinstance(error, MemoryError):
        return "out of memory: use fewer --samples, a shorter --sequence-length, or --dtype bfloat16"
    return None


def _fail(error: object, status: int, form: "Form | None") -> int:
    """Tells an error in the words of the command line."""
    line = " ".join(str(error).splitlines())  # names of files and columns may have several
    print(f"jprune: {line if form is None else form.spelled(line)}", file=sys.stderr)
    if "jprune.runs.processes" not in sys.modules:
        return status
    from jprune.runs import processes

    return processes.exit_now(status)
