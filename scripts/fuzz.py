"""Feeds jprune damaged files of every kind that it reads, and looks for anything but a result or a `JpruneError`.

    python scripts/fuzz.py --inputs 10000                   # of all kinds, by turns
    python scripts/fuzz.py --kinds gguf,index --minutes 30 --seed 7
    python scripts/fuzz.py --again FOLDER                   # inputs that were found before

A finding is another exception, a process that dies, more than ten seconds of work, more than 1 GiB of memory, or a file
touched outside the input's folder. Its input is kept below --found, with what went wrong beside it.
"""

import argparse
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fuzz_kinds import COMMANDS, KINDS, command, model, refusals

sys.dont_write_bytecode = True  # where an input is the first to need a module, that would be a file touched

SECONDS = 10
BYTES = 2**30
NOTE = "finding.txt"


class _TooLong(BaseException):
    pass


def attempt(kind: str, folder: Path) -> str | None:
    """Uses an input; what is wrong, or None if it was accepted or refused."""
    inside = folder.resolve()
    touched: list[str] = []
    watched.append((inside, touched))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _limit(SECONDS)
    try:
        KINDS[kind][1](folder)
    except refusals():
        pass
    except _TooLong:
        return f"more than {SECONDS} s of work, or {6 * SECONDS} s in all\n{traceback.format_exc()}"
    except BaseException:
        return traceback.format_exc()
    finally:
        _limit(0)
        watched.clear()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if more > BYTES:
        return f"{more / 2**20:.0f} MiB of memory"
    return f"touched outside: {touched[0]}" if touched else None


def _limit(seconds: float) -> None:
    """Raises `_TooLong` after so many seconds of the processor, and after six times as many by the clock."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)


def _bounded() -> None:
    for each in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(each, _raise)


watched: list[tuple[Path, list[str]]] = []
"""The folder of the input at hand, and what was touched outside of it."""


def _watch(event: str, args: tuple) -> None:
    if not watched:
        return
    inside, touched = watched[0]
    if event == "pickle.find_class" or event in ("os.system", "subprocess.Popen"):
        touched.append(f"{event} {args[:2]}")
    writes = {"os.remove": 0, "os.rename": 1, "os.rmdir": 0, "os.mkdir": 0, "os.symlink": 1, "shutil.rmtree": 0}
    if event.startswith("os.") and isinstance(args[-1], int) and args[-1] >= 0:
        return  # relative to a folder that was opened, as shutil.rmtree does
    if event == "open" and isinstance(args[0], str | bytes) and args[2] is not None:
        path = args[0] if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
    else:
        path = args[writes[event]] if event in writes else None
    if isinstance(path, str | bytes | Path):
        where = Path(os.fsdecode(path)).absolute()
        allowed = (inside, Path("/dev"), Path(tempfile.gettempdir()) / "jprune-tokenizer", _cache())
        if not any(str(where).startswith(str(place)) for place in allowed):
            touched.append(f"{event} {where}")


def _cache() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"])


def work(number: int, kinds: list[str], seed: int, until: float, inputs: int, found: Path, told: multiprocessing.Queue):
    """One process: makes inputs and uses them."""
    scratch = Path(tempfile.mkdtemp(prefix=f"fuzz-{number}-"))
    os.environ |= {"XDG_CACHE_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(scratch / "cache" / "jax")
    _bounded()
    import jprune.cli  # noqa: F401
    from jprune.checkpoints import load  # noqa: F401

    logging.disable()  # stderr is a file of each input, and closed after it
    _unwatched_first(kinds, scratch)
    sys.addaudithook(_watch)
    weights = [1 if kind in COMMANDS else 20 for kind in kinds]
    for i in range(inputs):
        name = f"{seed}-{number}-{i}"
        (kind,) = random.Random(name).choices(kinds, weights)
        folder = scratch / "input"
        shutil.rmtree(folder, ignore_errors=True)
        KINDS[kind][0](_fresh(folder), random.Random(name))
        told.put((number, kind, name, None))
        if (wrong := attempt(kind, folder)) is not None:
            kept = found / f"{kind}-{name}"
            shutil.rmtree(kept, ignore_errors=True)
            KINDS[kind][0](_fresh(kept), random.Random(name))  # as it was before it was used
            (kept / NOTE).write_text(wrong)
            told.put((number, kind, name, wrong))
        if time.monotonic() > until:
            break
    told.put((number, None, None, None))
    shutil.rmtree(scratch, ignore_errors=True)


def _unwatched_first(kinds: list[str], scratch: Path) -> None:
    """What the first use of each kind imports and caches is nobody's fault, nor how long a plan measures a machine."""
    from jprune.pipeline.forecast import speed

    with contextlib.suppress(ImportError):  # PyTorch, which the first config without a table would import
        import jprune.bridge.model  # noqa: F401
    speed.measure = functools.cache(speed.measure)
    model(_fresh(scratch / "warm"))
    command("prune", "magnitude", scratch / "warm", "--sparsity", "0.5", "--plan")
    shutil.rmtree(scratch / "warm")
    for kind in kinds:
        folder = _fresh(scratch / "warm")
        KINDS[kind][0](folder, random.Random(0))
        attempt(kind, folder)
        shutil.rmtree(folder)


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _raise(*_: object) -> None:
    raise _TooLong


def again(folder: Path) -> Iterator[tuple[str, str]]:
    """Uses inputs that were found before, each in a copy; gives those that are still wrong."""
    _bounded()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"XDG_CACHE_HOME": str(Path(scratch) / "cache"), "HF_HUB_OFFLINE": "1"}
        for path in sorted(folder.iterdir()):
            copy = Path(scratch) / path.name
            shutil.copytree(path, copy, ignore=shutil.ignore_patterns(NOTE))
            if (wrong := attempt(path.name.split("-")[0], copy)) is not None:
                yield path.name, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--inputs", type=int, default=10**9)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--found", type=Path, default=Path("found"))
    parser.add_argument("--again", type=Path)
    options = parser.parse_args()
    if options.again:
        wrong = list(again(options.again))
        print(f"{len(wrong)} of {len(list(options.again.iterdir()))} inputs are still wrong", *wrong, sep="\n")
        return bool(wrong)
    return hunt(options)


def hunt(options: argparse.Namespace) -> int:
    """Starts the processes, counts what they tell, and starts those anew that die."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    start = time.monotonic()
    until = start + 60 * options.minutes
    each = -(-options.inputs // options.processes)
    used, wrong, last = Counter(), Counter(), {}
    running = {}

    def begin(number: int) -> None:
        words = (number, options.kinds.split(","), options.seed, until, each, options.found, told)
        running[number] = context.Process(target=work, args=words, daemon=True)
        running[number].start()

    for number in range(options.processes):
        begin(number)
    while running:
        with contextlib.suppress(Exception):
            number, kind, name, finding = told.get(timeout=1)
            if kind is None:
                running.pop(number).join()
            elif finding is None:
                used[kind] += 1
                last[number] = (kind, name)
            else:
                wrong[kind] += 1
                print(f"{kind} {name}: {finding.strip().splitlines()[-1][:200]}", flush=True)
            continue
        for number, process in list(running.items()):
            if not process.is_alive():
                kind, name = last.get(number, ("nothing", ""))
                wrong[kind] += 1
                print(f"{kind} {name}: the process died ({process.exitcode})", flush=True)
                running.pop(number)
    print(json.dumps({"inputs": used, "findings": wrong, "minutes": round((time.monotonic() - start) / 60, 2)}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
