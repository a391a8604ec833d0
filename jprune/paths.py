"""Where jprune keeps what it may need again: a folder of the user's cache."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """jprune's folder in the user's cache: $XDG_CACHE_HOME/jprune, or ~/.cache/jprune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jprune"


def compiled_folder() -> Path:
    """The folder of compiled programs, which jax reads at the next run instead of compiling again."""
    return cache_folder() / "compiled"
