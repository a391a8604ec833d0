"""A pruning run in a process of its own that dies at a chosen moment, as a machine does.

`Disk` counts the operations by which a run changes the disk (opening a file to write, syncing, renaming, unlinking),
and ends the process before the one it is told. After a power failure, additionally, files hold what they held when they
were last synced. Or from one operation on, the disk is full. Processes are forked from a server that has imported JAX
but not started it (`start_server`).
"""

import builtins
import errno
import importlib
import io
import itertools
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

_context = multiprocessing.get_context("forkserver")
DEAD = 9  # exit status of a process that was to die
_open, _fsync = io.open, os.fsync


def start_server() -> None:
    """Imports once what every process needs."""
    _context.set_forkserver_preload(["killable", "jprune.pipeline.oneshot.run", "jprune.checkpoints.orbax", "optax"])


def run(*args: Any, **kwargs: Any) -> int:
    """`prune` in a process of its own; its exit status."""
    process = start(*args, **kwargs)
    process.join()
    return process.exitcode


def start(*args: Any, **kwargs: Any) -> Any:
    """As `run`, but does not wait for the process, and returns it."""
    process = _context.Process(target=prune, args=args, kwargs=kwargs)
    process.start()
    return process


def prune(
    options: dict[str, Any],
    *,
    watched: str,
    die_at: int | None = None,
    die_after: str | None = None,
    power: bool = False,
    count_into: str | None = None,
    stderr: str | None = None,
    job: str = "jprune.pipeline:prune_model",
) -> None:
    """Runs `prune_model(**options)`, or another `job`.

    Args:
      options: of prune_model.
      watched: operations below this folder count.
      die_at: the operation before which to die.
      die_after: die before the first operation after there is something at this path.
      power: die as by a power failure.
      count_into: file for the number of operations.
      stderr: file for what goes wrong.
    """
    if stderr:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    module, name = job.split(":")
    function = getattr(importlib.import_module(module), name)
    with Disk(Path(watched), die_at=die_at, die_after=die_after, power=power) as disk:
        function(**options)
    if count_into:
        Path(count_into).write_text(str(disk.count))


class Disk:
    """Counts what is done to files below a folder, and knows what of it has been synced.

    Args:
      folder: operations elsewhere do not count.
      die_at: the operation before which the process ends.
      die_after: likewise, the first one after there is something at this path.
      power: what has not been synced is lost then.
      full_at: the operation from which on nothing more can be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        die_at: int | None = None,
        die_after: str | None = None,
        power: bool = False,
        full_at: int | None = None,
    ) -> None:
        self.count = 0
        self._folder = str(folder)
        self._die_at, self._die_after, self._power, self._full_at = die_at, die_after, power, full_at
        self._synced: dict[int, bytes] = {}  # by inode
        self._lock = threading.Lock()
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "Disk":
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
            self._wrap(os, name, writes=False)
        self._wrap(os, "truncate", writes=True)
        self._patch(os, "fsync", self._sync)
        for module in (builtins, io):
            self._patch(module, "open", self._open)
        return self

    def __exit__(self, *_: Any) -> None:
        for module, name, function in self._before:
            setattr(module, name, function)

    def _patch(self, module: Any, name: str, function: Any) -> None:
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, function)

    def _wrap(self, module: Any, name: str, *, writes: bool) -> None:
        function = getattr(module, name)

        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            self._operation(path, writes=writes)
            return function(path, *args, **kwargs)

        self._patch(module, name, wrapped)

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str | os.PathLike) and set(mode) & set("wax+"):
            self._operation(file, writes=True)
        return _open(file, mode, *args, **kwargs)

    def _sync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._operation(path, writes=True)
        _fsync(descriptor)
        if self._power and path.startswith(self._folder) and os.path.isfile(path):
            with self._lock:
                self._synced[os.stat(path).st_ino] = Path(path).read_bytes()

    def _operation(self, path: Any, *, writes: bool) -> None:
        if not str(path if isinstance(path, int) else os.fspath(path)).startswith(self._folder):
            return
        with self._lock:
            self.count += 1
            if self.count == self._die_at or (self._die_after and os.path.exists(self._die_after)):
                if self._power:
                    self._lose()
                os._exit(DEAD)
            if writes and self._full_at is not None and self.count >= self._full_at:
                raise OSError(errno.ENOSPC, "No space left on device")

    def _lose(self) -> None:
        """Every file goes back to what was synced of it: renames have reached the disk, contents have not."""
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = os.path.join(folder, name)
                descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
                os.write(descriptor, self._synced.get(os.stat(path).st_ino, b""))
                os.close(descriptor)


def digest(folder: Path) -> dict[str, bytes]:
    """The files of a result, but for the record, which has times in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "jprune.json"
    }


def random_points(count: int, total: int, seed: int = 0) -> list[int]:
    """Distinct operations, all over the run."""
    edges = np.linspace(1, total, count + 1).astype(int)
    rng = np.random.default_rng(seed)
    return [int(rng.integers(low, max(high, low + 1))) for low, high in itertools.pairwise(edges)]
