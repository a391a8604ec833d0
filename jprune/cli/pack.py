"""`jprune pack`: a pruned model without its zeros."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jprune.cli import display
from jprune.cli.command import Command, Told
from jprune.cli.flags import Flags, Repeated, keywords
from jprune.pipeline.options import Result
from jprune.sparse.packing import Packing

if TYPE_CHECKING:
    from jprune.pipeline.pack import PackReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack(Command):
    """Write a pruned model without its zeros: smaller files, and less memory where it runs."""

    out: Path
    """Folder of the result; it appears when everything is done."""
    packing: Packing
    where: Repeated = ()
    """Regular expression over kernel paths; pack only what one of them finds. By default all kernels of the decoder
    blocks."""
    result: Annotated[Result, Flags(only=("overwrite", "resume"))]

    def run(self) -> Told:
        """Packs, kernel by kernel."""
        from jprune.pipeline.pack import pack

        with display.progress() as progress:
            report = pack(
                self.model, self.out, **keywords(self, "packing", "result"), where=self.where, progress=progress
            )
        return Told(report.json(), report.notices, functools.partial(_show, report))


def _show(report: "PackReport") -> None:
    before, after = report.kernel_bytes
    formats = ", ".join(f"{count} {format}" for format, count in sorted(report.formats.items()))
    print(f"{len(report.kernels)} kernels ({formats}): {_size(before, after)}")
    print(f"all parameters: {_size(report.model_bytes, report.bytes)}")
    if (lost := report.rounding) is not None:
        print(
            f"rounding changed kernels by {100 * lost['mean']:.3f} % of their norm, "
            f"{lost['worst_kernel']} most, by {100 * lost['worst']:.3f} %"
        )
    print(f"{report.seconds:.1f} s; peak memory {report.peak_memory_bytes / 1e9:.2f} GB")
    print(f"written to {report.out}")


def _size(before: int, after: int) -> str:
    return f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / max(before, 1):.3f})"
