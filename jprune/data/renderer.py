"""Renders chat templates in a process of its own (`jprune.data.rendering`), which is killed when one does not end."""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jprune.errors import JpruneError

SECONDS = 10.0
"""How long a template may take for a conversation."""
_PROGRAM = Path(__file__).with_name("rendering.py")
_lock = threading.Lock()
_running: dict[int, subprocess.Popen[bytes]] = {}  # by the process that started it: a fork has its own


def render(source: str, variables: Mapping[str, Any] | None) -> str:
    """The text that a template makes of variables; without variables it is only read.

    Raises:
        JpruneError: the template is none, raises an error, or takes too much time or memory.
    """
    request = json.dumps({"source": source, "variables": variables}, default=str).encode() + b"\n"
    with _lock:
        process = _process()
        assert process.stdin is not None
        assert process.stdout is not None
        stop = threading.Timer(SECONDS, process.kill)
        stop.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        except BaseException:  # an answer that nobody read would be taken for the next one
            _end()
            raise
        finally:
            stop.cancel()
        if not line:
            _end()
            raise JpruneError(f"it takes more than {SECONDS:g} seconds, or too much memory")
    answer = json.loads(line)
    if "error" in answer:
        raise JpruneError(" ".join(answer["error"].split()))
    return str(answer["text"])


def _process() -> subprocess.Popen[bytes]:
    process = _running.get(os.getpid())
    if process is None or process.poll() is not None:
        _end()
        process = _running[os.getpid()] = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for us
        )
    return process


@atexit.register
def _end() -> None:
    """Ends the process, if there is one."""
    process = _running.pop(os.getpid(), None)
    if process is not None:
        process.kill()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        process.wait()
