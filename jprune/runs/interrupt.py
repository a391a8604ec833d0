"""Ctrl-C that waits for a safe point: the first is remembered, the second stops at once.

Python raises KeyboardInterrupt wherever it happens to be, also inside other libraries' callbacks, which swallow it.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Gives a function to call at safe points: it raises KeyboardInterrupt if Ctrl-C has been pressed.

    In threads other than the main one, which get no signals, and where a program handles Ctrl-C by itself, nothing is
    changed.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield lambda: None
        return
    pressed = False

    def remember(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True
        logger.warning("stopping at the next safe point; Ctrl-C again stops at once, and is as safe")

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
