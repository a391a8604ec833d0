"""What the commands have in common."""

import contextlib
import dataclasses
from collections.abc import Iterator

import tyro
from jax.sharding import Mesh

from jprune import devices
from jprune.errors import UsageError
from jprune.runs import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has."""

    model: tyro.conf.Positional[str]
    """Hugging Face hub id, local folder, .safetensors or .gguf file, Orbax folder, or "demo", which is
    SmolLM2-135M-Instruct."""
    json: bool = False
    """Make the last line of stdout one JSON object, and print nothing else there."""

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """What must surround `run`."""
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDevices(Command):
    """What every command has that runs on several devices, and in several processes."""

    model_axis: int = 1
    """Devices among which the outputs of every kernel are shared out; the windows of text are among the others."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes run together; each is given the same command."""
    process_id: int | None = None
    """Number of this process, from 0."""
    num_processes: int | None = None
    """How many there are."""
    distributed: bool = False
    """Instead of the three: let JAX find them out, under SLURM, on TPU pods and on GKE."""

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Joins the other processes; of them only the first prints."""
        cluster = processes.Cluster(
            coordinator=self.coordinator, process_id=self.process_id, num_processes=self.num_processes
        )
        if self.distributed and self.coordinator:
            raise UsageError("--distributed lets JAX find the coordinator, so give it or --coordinator, not both")
        if not (self.distributed or self.coordinator):
            yield
            return
        cluster.start()
        with processes.only_first_speaks():
            yield

    def mesh(self) -> Mesh:
        """The devices of all processes."""
        return devices.make_mesh(self.model_axis)
