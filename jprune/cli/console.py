"""What stdout and stderr may be: consoles that lack characters, pipes that nobody reads any more, or nothing at all."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

CLOSED = 141
"""Exit status when nobody reads what is printed, as of a program that SIGPIPE ends: 128 + 13."""


def prepare() -> None:
    """Makes stdout and stderr take every text: characters that their encoding lacks are replaced."""
    sys.stdout, sys.stderr = _writable(sys.stdout), _writable(sys.stderr)


class Closed(Exception):
    """Nobody reads stdout or stderr any more, or they cannot be written; says why if somebody should know."""


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """All that was printed inside is out in the end, also where the context is left by an error.

    Raises:
      Closed: it could not be written. What is printed from then on goes nowhere, at the end of the process too.
    """
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                _flush(stream)
    except BrokenPipeError as error:
        _redirect(sys.stdout, sys.stderr)
        raise Closed from error


class _Nowhere(io.TextIOBase):
    """Takes everything, and keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, say
        _redirect(stream)
        raise Closed(f"what was printed could not be written: {error.strerror}") from error


def _writable(stream: TextIO | None) -> Any:
    if stream is None:  # closed by the shell, or a program without a console
        return _Nowhere()
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")
    return stream


def _redirect(*streams: TextIO) -> None:
    """Sends what streams still hold nowhere: else Python would complain of it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # no file of the system behind it
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
