"""Paths as users give them, and where jprune keeps what it may need again.

On the command line, in recipe files and in Python alike, a relative path begins where the user stands (not where the
recipe lies), and ``~`` is a home.
"""

import os
from pathlib import Path

from jprune.errors import JpruneError


def given(path: str | Path) -> Path:
    """A path as its user means it, with ``~`` and ``~name`` for homes; it need not be there.

    Raises:
      JpruneError: no path can be called so, or the system does not let us look.
    """
    try:
        os.fsencode(path)
        found = Path(path).expanduser() if str(path).startswith("~") else Path(path)
        if str(found).startswith("~"):  # ./~a: whoever asks again gets the same
            found = found.absolute()
        found.exists()
    except RuntimeError as error:
        raise JpruneError(f"{path}: no such home; give the whole path, or ./~... for a file of that name") from error
    except OSError as error:
        raise JpruneError(f"{path} cannot be used as a path: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise JpruneError(f"{str(path)!r} cannot be the name of a file here: {error.reason}") from error
    if "\0" in str(path):
        raise JpruneError(f"{str(path)!r} cannot be the name of a file: it has a NUL character")
    return found


def real(path: str | Path) -> Path:
    """A folder that can be renamed, and have others beside it: what a link points to, ``.`` by its name.

    Raises:
      JpruneError: as `given`; or there is no such folder.
    """
    found = given(path)
    if found.is_symlink() or found.name in ("", ".."):
        try:
            found = found.resolve()
        except (OSError, RuntimeError) as error:
            raise JpruneError(f"{path} is a link that leads nowhere: {error}") from error
    if not found.name:
        raise JpruneError(f"{path} is the root of all folders; choose one in it")
    return found


def cache_folder() -> Path:
    """jprune's folder in the user's cache: $XDG_CACHE_HOME/jprune, or ~/.cache/jprune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jprune"


def compiled_folder() -> Path:
    """The folder of compiled programs, which jax reads at the next run instead of compiling again."""
    return cache_folder() / "compiled"
