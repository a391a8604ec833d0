"""The options of commands that prune single weights: on what text, which kernels, and in how much memory."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from jprune.patterns import Scope
from jprune.runs import memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """How weights are pruned, whatever the method."""

    out: Path | None = None
    """Folder of the result; it appears when everything is done. What is needed to resume is kept beside it, in
    OUT.run."""
    per: Scope | None = None
    """Where weights compete for --sparsity: among the inputs of each output, in blocks of 128 inputs, or in the whole
    kernel. By default as the method's authors do."""
    calibration: str = "pydoc"
    """Calibration text: pydoc, a text file, .jsonl, .jsonl.gz, .parquet, .npy of token ids, or hf:DATASET."""
    samples: int | None = None
    """Calibration windows. By default 128, or 64 for the demo model."""
    sequence_length: int | None = None
    """Tokens of a calibration window. By default 2048 or the model's context, or 512 for the demo model."""
    where: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Regular expression over kernel paths; prune only what one of them finds."""
    skip: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Regular expression over kernel paths; leave alone what one of them finds."""
    dtype: str | None = None
    """Of the activations while pruning: float32, bfloat16 or float16. By default float32 on CPU, else what the weights
    have."""
    expert_tokens: int = 128
    """An expert that sees fewer calibration tokens than this is pruned by magnitude, whatever the method."""
    memory: str | None = None
    """Memory that pruning may take, such as 6GB. By default what the process has and three quarters of what is free."""
    plan: bool = False
    """Print what would be done, what it takes and how long, and touch nothing."""
    resume: bool = False
    """Go on with a run that was interrupted, to the same result; begin if there is none."""
    overwrite: bool = False
    """Replace --out if an earlier run wrote it; without --resume, drop a run that was interrupted."""
    recipe: Path | None = None
    """TOML or JSON file with options, or the jprune.json of an earlier run; the command line counts more."""

    def pruning(self) -> dict[str, Any]:
        """The options by their names in Python, without those of the pattern and of the result."""
        return {
            "calibration": self.calibration,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "where": self.where,
            "skip": self.skip,
            "dtype": self.dtype,
            "expert_tokens": self.expert_tokens,
            "memory": None if self.memory is None else memory.parse(self.memory),
        }
