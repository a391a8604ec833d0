"""What is not installed. The pure part of jprune needs jax, optax and numpy alone; checkpoints and runs need more."""

import importlib.util

from jprune.errors import JpruneError


class MissingPackage(JpruneError, ImportError):
    """A package that this part of jprune needs is not installed: an `ImportError`, as Python's own."""

    def __init__(self, package: str, what: str = "this part of jprune"):
        super().__init__(
            f"{what} needs the package {package}, which is not installed here; `pip install jprune` installs it (with "
            "jax, optax and numpy alone there is what works on functions and pytrees)"
        )
        self.name = package


def missing(error: ModuleNotFoundError, what: str) -> Exception:
    """What to tell of a package that an import did not find; the error itself where it is a module of jprune."""
    package = error.name or ""
    return error if package.partition(".")[0] == "jprune" else MissingPackage(package, what)


def require(package: str) -> None:
    """Raises `MissingPackage` if a package, by the name that Python imports, is not installed."""
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # not even what it lies in
        found = None
    if found is None:
        raise MissingPackage(package)
