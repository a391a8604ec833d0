"""A pruning run in a process of its own that dies at a chosen moment, as a machine does.

`prune` counts the operations by which a run changes the disk (opening a file to write, syncing, renaming, unlinking)
and ends the process before the one it is told. After a power failure, additionally, files hold what they held when they
were last synced. Processes are forked from a server that has imported JAX but not started it (`start_server`).
"""

import builtins
import io
import multiprocessing
import os
import pathlib
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

_context = multiprocessing.get_context("forkserver")
DEAD = 9  # exit status of a process that was to die


def start_server() -> None:
    """Imports once what every process needs."""
    _context.set_forkserver_preload(["killable", "jprune.pipeline.run", "jprune.checkpoints.orbax", "optax"])


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
    die_at: int | None = None,
    power: bool = False,
    count_into: str | None = None,
    watched: str = "",
    cache: str | None = None,
    stderr: str | None = None,
) -> None:
    """Runs `prune_model(**options)`.

    Args:
      options: of prune_model; "method" by its name.
      die_at: the operation before which to die.
      power: die as by a power failure: files lose what was not synced.
      count_into: file for the number of operations.
      watched: operations below this folder count.
      cache: folder for compiled programs.
      stderr: file for what goes wrong.
    """
    if stderr:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from jprune.methods import METHODS
    from jprune.pipeline import forecast, prune_model

    forecast.windows_at_once = lambda length: 2
    disk = _Disk(Path(watched), die_at, power)
    if watched:
        disk.install()
    options = {**options, "method": METHODS[options["method"]]()}
    prune_model(**options)
    if count_into:
        Path(count_into).write_text(str(disk.count))
    sys.stdout.flush()
    os._exit(0)


class _Disk:
    """Counts what is done to files below a folder, and knows what of it has been synced."""

    def __init__(self, folder: Path, die_at: int | None, power: bool):
        self.folder = str(folder)
        self.count = 0
        self._die_at = die_at
        self._power = power
        self._synced: dict[int, bytes] = {}  # by inode
        self._lock = threading.Lock()
        self._fsync = os.fsync

    def install(self) -> None:
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
            self._wrap(os, name)
        os.fsync = self._sync
        opened = io.open

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, str | os.PathLike) and set(mode) & set("wax+"):
                self._operation(file)
            return opened(file, mode, *args, **kwargs)

        builtins.open = io.open = open_
        pathlib.io.open = open_ if hasattr(pathlib, "io") else opened

    def _wrap(self, module: Any, name: str) -> None:
        function = getattr(module, name)

        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            self._operation(path)
            return function(path, *args, **kwargs)

        setattr(module, name, wrapped)

    def _sync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._operation(path)
        self._fsync(descriptor)
        if self._power and path.startswith(self.folder) and os.path.isfile(path):
            with self._lock:
                self._synced[os.stat(path).st_ino] = Path(path).read_bytes()

    def _operation(self, path: Any) -> None:
        if not str(os.fspath(path) if not isinstance(path, int) else path).startswith(self.folder):
            return
        with self._lock:
            self.count += 1
            if self.count == self._die_at:
                if self._power:
                    self._lose()
                os._exit(DEAD)

    def _lose(self) -> None:
        """Every file goes back to what was synced of it: renames have reached the disk, contents have not."""
        for folder, _, names in os.walk(self.folder):
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
    return [int(rng.integers(low, max(high, low + 1))) for low, high in zip(edges, edges[1:])]
