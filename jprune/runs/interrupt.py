"""Ctrl-C that waits for a safe point: the first is remembered, the second stops at once.

Python raises KeyboardInterrupt wherever it happens to be, also inside other libraries' callbacks, which swallow it.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)


class CtrlC:
    """Whether Ctrl-C has been pressed. To be called, or to be asked for `pressed`, at safe points."""

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C has been pressed."""
        if self.pressed:
            raise KeyboardInterrupt

    def remember(self, number: int, frame: Any) -> None:
        """Handles the signal."""
        if self.pressed:
            signal.default_int_handler(number, frame)
        self.pressed = True
        logger.warning("stopping at the next safe point; Ctrl-C again stops at once, and is as safe")


@contextlib.contextmanager
def deferred() -> Iterator[CtrlC]:
    """Remembers Ctrl-C for the safe points of what is inside.

    In threads other than the main one, which get no signals, and where a program handles Ctrl-C by itself, nothing is
    changed: that program knows why.
    """
    ctrl_c, before = CtrlC(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield ctrl_c
        return
    signal.signal(signal.SIGINT, ctrl_c.remember)
    try:
        yield ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)
