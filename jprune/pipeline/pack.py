"""A model into a packed folder: `jprune pack`."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jprune import paths
from jprune.checkpoints import Checkpoint, load, record, writing
from jprune.checkpoints.packed.layout import DENSE, part
from jprune.checkpoints.packed.write import PackedReport, Writer
from jprune.runs import failures, interrupt, output
from jprune.runs.folder import FINISHED, RunFolder, default_folder, finished
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes
from jprune.sparse.packing import Packing, Values

LESS_MEMORY = "a machine that holds the largest parameter several times, and a file of packed ones"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackReport:
    """What packing a model did."""

    out: Path
    """The folder."""
    kernels: tuple[PackedReport, ...]
    """Of the kernels that were to be packed."""
    model_bytes: int
    """Of all parameters as they came in."""
    seconds: float
    peak_memory_bytes: int
    """The most host memory that the process had."""

    @property
    def kernel_bytes(self) -> tuple[int, int]:
        """Bytes of those kernels before and after."""
        return sum(kernel.bytes_before for kernel in self.kernels), sum(kernel.bytes for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters as they are stored."""
        before, after = self.kernel_bytes
        return self.model_bytes - before + after

    @property
    def formats(self) -> dict[str, int]:
        """How many kernels are in each format."""
        return dict(collections.Counter(kernel.format for kernel in self.kernels))

    @property
    def rounding(self) -> dict[str, Any] | None:
        """Mean and worst relative error of what was rounded, and the kernel of the worst; None if nothing was."""
        rounded = [kernel for kernel in self.kernels if kernel.error]
        if not rounded:
            return None
        worst = max(rounded, key=lambda kernel: kernel.error)
        mean = sum(kernel.error for kernel in rounded) / len(rounded)
        return {"mean": mean, "worst": worst.error, "worst_kernel": worst.path}

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know."""
        dense = self.formats.get(DENSE, 0)
        if dense < len(self.kernels):
            return ()
        return ("no kernel has enough zeros to be smaller packed; the result is as large as the model",)

    @classmethod
    def from_record(cls, contents: Mapping[str, Any], out: Path) -> "PackReport":
        """The report of an earlier run, from its record."""
        packed = contents["packed"]
        return cls(
            out=out,
            kernels=tuple(PackedReport(**kernel) for kernel in packed["kernels"]),
            model_bytes=packed["bytes_before"],
            seconds=packed["seconds"],
            peak_memory_bytes=packed["peak_memory_bytes"],
        )

    def json(self) -> dict[str, Any]:
        """The report as plain values."""
        before, after = self.kernel_bytes
        return {
            "out": str(self.out),
            "formats": self.formats,
            "bytes_before": self.model_bytes,
            "bytes": self.bytes,
            "kernel_bytes_before": before,
            "kernel_bytes": after,
            "rounding": self.rounding,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "notices": list(self.notices),
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
        }


def pack(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    values: Values | None = None,
    where: tuple[str, ...] = (),
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PackReport:
    """Writes a model with its kernels packed, parameter by parameter; `jprune.load` reads the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      format: "auto" (the smallest that holds a kernel), "bitmap" or "capped:C"; see `jprune.sparse.Packing`.
      values: "16", "int8" or "float8_e4m3fn", which round; by default values are stored as they are.
      where: regular expressions over paths such as ``blocks/3/attn/q/kernel``; by default all kernels of the blocks.
      overwrite: replace the folder if jprune wrote it.
      resume: go on with a run that was interrupted, which is in OUT.run; begin if there is none.
      progress: called for every parameter.

    Raises:
      JpruneError: an option outside its range, an expression that finds nothing, a kernel that the format does not
        hold, or a folder that cannot be written.
      KeyboardInterrupt: Ctrl-C, at the next parameter. The files that are complete are kept, as after any failure.
    """
    stopwatch, packing = Stopwatch(), Packing(format=format, values=values)
    shown, out = paths.given(out), paths.real(out)
    place = default_folder(out)
    if resume and finished(place, out):
        return PackReport.from_record(record.read(out), shown)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    output.check(out, overwrite=overwrite, source=checkpoint.source)
    asked = {"from": checkpoint.source, "format": format, "values": values, "where": list(where)}
    fingerprint = {"the model": checkpoint.fingerprint(), **{k: v for k, v in asked.items() if k != "from"}}
    folder = RunFolder(place, out=out, fingerprint=fingerprint, resume=resume, overwrite=overwrite)
    with failures.explained(folder, lambda: (LESS_MEMORY,)), interrupt.deferred() as check:
        with writing.explained(folder.partial):
            folder.partial.mkdir(exist_ok=True)
        done = tuple(_parts(folder))
        with Writer(folder.partial, checkpoint, packing=packing, where=where, done=done, mark=folder.mark) as writer:
            missing, total = writer.missing, len(checkpoint.shapes)
            for number, path in enumerate(missing, total - len(missing) + 1):
                check()
                writer.write(path, checkpoint.read(path))
                progress(Progress(float(number), total, path, "packing"))
        report = PackReport(
            out=shown,
            kernels=tuple(writer.reports),
            model_bytes=checkpoint.nbytes,
            seconds=stopwatch.seconds()["total"],
            peak_memory_bytes=peak_memory_bytes(),
        )
        said = {key: value for key, value in report.json().items() if key not in ("out", "notices")}
        record.write(folder.partial, {**_carried(checkpoint), "packed": asked | said})
        folder.mark(FINISHED, {})
        output.publish(folder.partial, out, folder.old, overwrite=overwrite, source=checkpoint.source)
    folder.remove()
    return report


def _parts(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """What is known of the files that an interrupted run has left."""
    number = 1
    while (known := folder.marked(part(number))) is not None:
        yield known
        number += 1


def _carried(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the record of the model says, without what it says of its files; who it is, if there is none."""
    folder = paths.given(checkpoint.source)
    if not (folder / record.NAME).is_file():
        return {"packed_from": checkpoint.source, "fingerprint": checkpoint.fingerprint()}
    return {k: v for k, v in record.read(folder).items() if k not in ("format_version", "files", "checksum")}
