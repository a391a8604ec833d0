"""A run that has begun: where it is kept, how it is laid out, and whom it tells."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from jprune.pipeline.forecast.forecast import Forecast
from jprune.pipeline.forecast.layout import Layout
from jprune.pipeline.job import Job
from jprune.runs.activations import Room
from jprune.runs.folder import RunFolder
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What every step of a run needs beside the job."""

    folder: RunFolder
    layout: Layout
    """How calibration is cut up."""
    room: Room
    """Memory for activations."""
    stopwatch: Stopwatch
    """Gets the phases "calibration", "solve", "evaluation" and "io" (waiting for what runs in the background)."""
    tell: Callable[[Progress], None] = lambda _: None
    """Called often; may raise KeyboardInterrupt."""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The machine that it runs on now."""
    notices: tuple[str, ...] = ()
    """What the user should know, one sentence each."""

    @classmethod
    def begin(
        cls,
        job: Job,
        forecast: Forecast,
        folder: RunFolder,
        stopwatch: Stopwatch,
        tell: Callable[[Progress], None],
    ) -> "Run":
        """Lays the run out: for the memory there is, or as it was when it began."""
        layout, memory = forecast.choose(folder.folder)
        machine = {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "mesh": dict(job.mesh.shape),
            "processes": jax.process_count(),
        }
        decided = folder.decide({**dataclasses.asdict(layout), "machine": machine})
        agreed = Layout(windows=decided["windows"], carry_limit=decided["carry_limit"])
        if agreed != layout:
            layout, memory = agreed, forecast.memory(agreed)
        texts = (text for text in (job.calibration, job.evaluation) if text)
        notices = list(dict.fromkeys(notice for text in texts for notice in text.notices))
        if not memory.fits:
            notices.append(f"this may need more than {memory.limit / 1e9:.2g} GB of memory; see `plan`")
        if decided["machine"] != machine:
            notices.append(
                f"begun on {decided['machine']}, resumed on {machine}: the last bits may not be those of one run"
            )
        return cls(
            folder=folder,
            layout=layout,
            room=memory.room,
            stopwatch=stopwatch,
            tell=tell,
            machine=machine,
            notices=tuple(notices),
        )
