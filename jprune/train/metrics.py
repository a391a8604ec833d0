"""What a run measured, step by step: lines of JSON, and TensorBoard's event files where its package is installed.

    {"step": 10, "loss": 2.31, "gradient_norm": 0.8, "learning_rate": 9.8e-05, "tokens_per_second": 5120.0}

Steps count from 1. A resumed run drops the lines after the step it goes on from, so that every step is there once.
"""

import importlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"
LOSSES = ("loss", "evaluation_loss")


class Metrics:
    """Appends to ``metrics.jsonl`` in a folder, and to event files in its subfolder ``tensorboard``.

    Args:
      folder: where; it exists.
      after: lines of later steps than this are dropped.
    """

    def __init__(self, folder: Path, *, after: int = 0):
        self.path = folder / NAME
        kept = [line for line in read(self.path) if line["step"] <= after] if after else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _event_writer(folder / "tensorboard")

    def write(self, step: int, **values: float) -> None:
        """The values of one step; what is written is on its way to the disk at once."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board(step, values)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board(None, {})


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if there is no file, and not one that a crash cut short."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def panels(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """(step, value) of every series, by the panel of a plot that it belongs to, and by its name there.

    Metrics that are called A/B share the panel A, and the losses have one of their own; every other metric has its
    own. The speed, and what is no finite number, are left out.
    """
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for key, value in line.items():
            if key in ("step", "tokens_per_second") or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            panel, _, name = key.partition("/")
            if key in LOSSES:
                panel = "losses"
            found.setdefault(panel, {}).setdefault(name or key, []).append((line["step"], float(value)))
    return found


def _event_writer(folder: Path) -> Any:
    """A function (step or None to close, values) that writes TensorBoard events; None if nothing can write them."""
    for name, make in (("tensorboardX", _tensorboardx), ("tensorboard.summary.writer.event_file_writer", _tensorboard)):
        try:
            return make(importlib.import_module(name), folder)
        except ImportError:
            continue
    return None


def _tensorboardx(module: Any, folder: Path) -> Any:
    writer = module.SummaryWriter(str(folder))

    def write(step: int | None, values: dict[str, float]) -> None:
        if step is None:
            writer.close()
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write


def _tensorboard(module: Any, folder: Path) -> Any:
    from tensorboard.compat.proto import event_pb2, summary_pb2

    writer = module.EventFileWriter(str(folder))

    def write(step: int | None, values: dict[str, float]) -> None:
        if step is None:
            writer.close()
            return
        scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = summary_pb2.Summary(value=scalars)
        writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    return write
