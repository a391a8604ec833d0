"""`jprune convert`: a model in another format or dtype."""

import dataclasses
from pathlib import Path
from typing import Annotated

from jprune.cli.command import Command, Told
from jprune.cli.flags import Flags, Word
from jprune.pipeline.options import Output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Write a model in another format or dtype, or with an adapter merged."""

    out: Path
    """Folder of the result; it appears when everything is done."""
    result: Annotated[Output, Flags(words={"format": Word(default="hf")})]
    dtype: str | None = None
    """Dtype of the result's weights: float32, bfloat16 or float16. By default that of the model's."""
    saturate: bool = False
    """Make numbers that the dtype cannot hold its largest, instead of refusing them."""
    adapter: Path | None = None
    """Folder with a LoRA adapter, as PEFT writes it, to merge into the model."""

    def run(self) -> Told:
        """Converts, tensor by tensor where the format allows."""
        from jprune.checkpoints import formats, load, record
        from jprune.checkpoints.dtypes import parse_dtype
        from jprune.runs.output import new_folder

        checkpoint = load(self.model, adapter=self.adapter)
        dtype = None if self.dtype is None else parse_dtype(self.dtype)
        dtypes = {path: dtype or shape.dtype for path, shape in checkpoint.shapes.items()}
        format = self.result.format or "hf"
        formats.check(checkpoint, format)
        with new_folder(self.out, overwrite=self.result.overwrite, source=checkpoint.source) as folder:
            notices = formats.write(folder, checkpoint, format=format, dtypes=dtypes, saturate=self.saturate)
            contents = {"converted_from": checkpoint.source, "fingerprint": checkpoint.fingerprint()}
            if self.adapter is not None:
                contents["adapter"] = str(self.adapter)
            record.write(folder, contents)
        found = {
            "out": str(self.out),
            "format": format,
            "parameters": checkpoint.parameters,
            "notices": list(notices),
        }
        return Told(found, tuple(notices), lambda: print(f"written to {self.out}"))
