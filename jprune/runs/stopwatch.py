"""Where the seconds of a run go: phases, with compilation counted apart; and the memory it took."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_compiled = [0.0]  # seconds that this process has spent compiling; JAX has no way to remove a listener again


def _count_compilation(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del kwargs
    if event in _COMPILE_EVENTS:
        _compiled[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


class Stopwatch:
    """Seconds by phase. Phases must not overlap; what is compiled during one counts as "compile" instead."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {"compile": 0.0}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside; work dispatched inside must also be waited for inside."""
        start, compiled = time.perf_counter(), _compiled[0]
        try:
            yield
        finally:
            compiling = _compiled[0] - compiled
            self._seconds["compile"] += compiling
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start - compiling

    def seconds(self) -> dict[str, float]:
        """Of every phase so far, and the total since the start, which also has what no phase covers."""
        rounded = {name: round(value, 3) for name, value in self._seconds.items()}
        return {"total": round(time.perf_counter() - self._start, 3), **rounded}


def peak_memory_bytes() -> int:
    """The most host memory that this process has had resident at one time."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts a parent's memory, from before exec, into ru_maxrss
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory() -> None:
    """Lets `peak_memory_bytes` begin anew at what is resident now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_device_memory_bytes() -> int | None:
    """The most memory of the first accelerator that was in use at one time; None on CPU."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")
