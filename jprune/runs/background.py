"""One thread that does things in order while the main thread computes: reads ahead, writes behind.

It only moves bytes. Nothing that it does can change what is computed.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Runs jobs one after the other.

    Args:
      limit: bytes that jobs may hold before `submit` waits for some of them to end; one job may exceed it alone.
    """

    def __init__(self, limit: int = 2**62):
        self._limit = limit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jprune")
        self._pending: deque[tuple[Future, int]] = deque()

    def submit(self, job: Callable[[], T], nbytes: int = 0) -> "Future[T]":
        """Queues a job that holds `nbytes` bytes until it is done. Raises what an earlier job raised."""
        while self._pending and (self._pending[0][0].done() or sum(n for _, n in self._pending) + nbytes > self._limit):
            self._pending.popleft()[0].result()
        future = self._thread.submit(job)
        self._pending.append((future, nbytes))
        return future

    def wait(self) -> None:
        """Returns when all jobs are done. Raises what one of them raised."""
        while self._pending:
            self._pending.popleft()[0].result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            # After an error what has not begun is dropped; what has begun ends, so that nobody writes after us.
            self._thread.shutdown(wait=True, cancel_futures=True)
