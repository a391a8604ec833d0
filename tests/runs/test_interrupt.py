"""Ctrl-C waits for a safe point, once."""

import signal
import threading

import pytest

from jprune.runs import interrupt


def test_the_first_is_remembered_and_the_second_stops(caplog):
    before = signal.getsignal(signal.SIGINT)
    with interrupt.deferred() as ctrl_c:
        ctrl_c()
        assert not ctrl_c.pressed
        signal.raise_signal(signal.SIGINT)
        assert ctrl_c.pressed
        assert "stopping at the next safe point" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_goes_when_something_fails():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), interrupt.deferred():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_of_the_program_stays():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        with interrupt.deferred() as ctrl_c:
            signal.raise_signal(signal.SIGINT)
        assert pressed
        assert not ctrl_c.pressed
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing():
    found = []

    def work():
        with interrupt.deferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
