"""Several processes of one run, as on the hosts of a cluster: how they begin, agree, and fail together.

Every process runs the same program over its part of the mesh. Process 0 decides what must be decided once, and writes;
the others are told. All of them see the same files: the run folder and the result lie where every host can read them.

What one process raises because of what the user gave, all raise. A process that dies breaks the communication of the
others, and JAX ends those that would wait for it in vain.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from jprune.errors import JpruneError, UsageError
from jprune.settings import as_json, first_difference

T = TypeVar("T")
PATIENCE = 300
"""Seconds to wait for the other processes to begin."""
HEARTBEAT = 60
"""Seconds after which a process of which nothing is heard counts as dead."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """How the processes find each other.

    Attributes:
      coordinator: HOST:PORT of process 0, with `process_id` and `num_processes`; None: JAX finds out itself, as it can
        under SLURM, on TPU pods, on GKE and under Open MPI.
    """

    coordinator: str | None = None
    process_id: int | None = None
    num_processes: int | None = None

    def __post_init__(self):
        given = (self.coordinator, self.process_id, self.num_processes)
        if any(value is None for value in given) and any(value is not None for value in given):
            raise UsageError(
                "`coordinator` HOST:PORT, `process_id` I and `num_processes` N go together; where JAX finds them out "
                "itself (SLURM, TPU pods, GKE), give `distributed` instead"
            )
        if self.process_id is None or self.num_processes is None:
            return
        if not 0 <= self.process_id < self.num_processes:
            raise UsageError(
                f"`process_id` must be in [0, {self.num_processes}), as there are {self.num_processes} processes; "
                f"got {self.process_id}"
            )
        _, _, port = (self.coordinator or "").rpartition(":")
        if not port.isdecimal() or not self._host:
            raise UsageError(
                f"`coordinator` must be HOST:PORT of process 0, such as 10.0.0.1:1234; got {self.coordinator}"
            )

    def start(self) -> None:
        """Joins the other processes. Must come before anything that uses a device.

        Raises:
          JpruneError: the coordinator cannot be reached, or JAX finds no cluster.
        """
        if self.process_id:  # JAX ends the process where nobody answers; so look before
            self._wait_for_coordinator()
        elif self.process_id == 0:
            logger.warning("process 0 of %d waits for the others at %s", self.num_processes, self.coordinator)
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.num_processes,
                self.process_id,
                initialization_timeout=PATIENCE,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )
        except (ValueError, RuntimeError) as error:
            what = (
                f"the processes at {self.coordinator} cannot be joined" if self.coordinator else "no cluster was found"
            )
            raise JpruneError(
                f"{what} ({str(error).splitlines()[0]}); check `coordinator`, `process_id` and `num_processes`, or "
                "that this is a SLURM job, a TPU pod or a GKE job"
            ) from error

    @property
    def _host(self) -> str:
        return (self.coordinator or "").rpartition(":")[0].strip("[]")

    def _wait_for_coordinator(self) -> None:
        assert self.coordinator is not None
        end = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection((self._host, int(self.coordinator.rpartition(":")[2])), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise JpruneError(
                        f"the coordinator {self.coordinator} could not be reached for {PATIENCE} s ({error}); check "
                        "that process 0 runs there, and that the port is open"
                    ) from error
                time.sleep(0.5)


def are_many() -> bool:
    """Whether this process has joined others. Starts no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process decides and writes."""
    return not are_many() or jax.process_index() == 0


def own_part() -> str:
    """Name of a folder of what this process alone has; "" if it is the only one."""
    return f"{jax.process_index()}-of-{jax.process_count()}" if are_many() else ""


def gathered(value: Any) -> list[Any]:
    """What every process gives (JSON), in the order of their numbers; every process gets all."""
    if not are_many():
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size], np.int32))[:, 0]
    longest = 1 << int(sizes.max()).bit_length()  # few sizes, so that few programs are compiled
    rows = multihost_utils.process_allgather(np.pad(text, (0, longest - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def decided_by_first(act: Callable[[], T]) -> T:
    """What process 0 gets from `act` (JSON), in every process; a JpruneError of it is raised in every process."""
    if not are_many():
        return act()
    with run_together():
        value = act() if is_first() else None
    return gathered(value)[0]


@contextlib.contextmanager
def run_together() -> Iterator[None]:
    """A part that every process goes through: if it raises JpruneError in one, all raise one after it."""
    error = None
    try:
        yield
    except JpruneError as raised:
        error = raised
    if are_many():
        said = gathered(None if error is None else str(error))
        other = next((i for i, text in enumerate(said) if text is not None), None)
        if error is None and other is not None:
            raise JpruneError(f"process {other}: {said[other]}")
    if error is not None:
        raise error


def check_alike(facts: Mapping[str, Any]) -> None:
    """Raises JpruneError, in every process, unless all have the same facts (JSON, by names that users understand)."""
    everywhere = gathered(as_json(facts))
    for i, theirs in enumerate(everywhere):
        if (difference := first_difference(theirs, everywhere[0])) is not None:
            name, value, of_first = difference
            raise JpruneError(
                f"process {i} and process 0 differ in {name}: {value} and {of_first}; start all with the same command, "
                "where all see the same files"
            )


def lost(error: BaseException) -> str | None:
    """If an error says that another process is gone: what to tell."""
    if not are_many() or not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(error):
        return None
    return (
        f"another process of this run has ended or cannot be reached ({str(error).splitlines()[0][:200]}); see what it "
        "said last"
    )


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Silences what other processes print; errors leave the context and can be told outside of it."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def exit_now(status: int) -> int:
    """Ends a process whose run has failed, without the farewell for which JAX would wait for the others."""
    if are_many():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
