"""The output folder: it appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jprune import paths
from jprune.checkpoints import record, writing
from jprune.errors import JpruneError


def check(out: Path, *, overwrite: bool, source: str) -> None:
    """Raises `JpruneError` if `out` may not or cannot be written: it exists, or holds what is not ours to remove."""
    model = paths.given(source).resolve()
    if model.exists() and out.resolve() in (model, *model.parents):
        raise JpruneError(f"`out` {out} is the model itself or a folder above it; choose another folder")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "nothing may be written there" if parent.is_dir() else "it is a file"
        raise JpruneError(f"`out` {out} cannot be made in {parent}: {why}; choose another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise JpruneError(f"`out` {out} is a file; give a folder that does not exist")
    _check_replaceable(out)
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise JpruneError(f"`out` {out} exists; give another folder, or `overwrite` to replace it")
    if not (out / record.NAME).exists():
        raise JpruneError(
            f"`out` {out} exists and jprune did not write it (there is no {record.NAME}); "
            "remove it yourself, or choose another folder"
        )


def _check_replaceable(out: Path) -> None:
    """Raises `JpruneError` if a folder cannot be replaced by another one of its name, or should not be."""
    if os.path.ismount(out):
        raise JpruneError(f"`out` {out} is a disk of its own and cannot be replaced; give a folder in it")
    here = Path.cwd()
    if out.resolve() in (here, *here.parents):
        raise JpruneError(f"`out` {out} is the folder you are in, or above it; give another one, such as ./pruned")
    if not os.access(out, os.W_OK | os.X_OK):
        raise JpruneError(f"`out` {out} is read-only; give another folder, or make it writable")


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool, source: str) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the context ends well, and vanishes when it does not.

    Raises:
      JpruneError: `out` may not be written (see `check`), or no folder can be made there.
    """
    out = paths.real(out)
    check(out, overwrite=overwrite, source=source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise JpruneError(f"`out` {out} cannot be written: {error}; check the path and its permissions") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes folders private
        yield temporary
        publish(temporary, out, temporary.with_suffix(".old"), overwrite=overwrite, source=source)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(folder: Path, out: Path, old: Path, *, overwrite: bool, source: str) -> None:
    """Makes a complete folder `out`, after everything in it has reached the disk; what `out` was goes by way of `old`.

    Raises:
      JpruneError: `out` may not be written (see `check`): somebody else may have been there meanwhile.
    """
    check(out, overwrite=overwrite, source=source)
    with writing.explained(out):
        writing.sync_folder(folder)
        if out.exists():
            out.rename(old)
        folder.rename(out)
        writing.sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
