"""The result of a model that becomes smaller: whole parameters come, and what stays of them is written."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np

from jprune import positions
from jprune.checkpoints import huggingface
from jprune.pipeline.job import Job


class CutWriter:
    """A `huggingface.Writer` for parameters that are pruned in the shapes of the whole model.

    Args:
      writer: takes the parameters of the smaller model.
      job: says what stays of which.
    """

    def __init__(self, writer: huggingface.Writer, job: Job):
        self._writer, self._job = writer, job
        self._pruned = {kernel.path for kernel in job.kernels}

    def write(self, path: str, array: np.ndarray | jax.Array) -> int:
        """Writes what stays of a parameter; returns the checksum of what is there."""
        return self._writer.write(path, positions.cut(np.asarray(array), self._job.cut.get(path, {})))

    def read(self, path: str) -> np.ndarray:
        """A whole parameter as it was used after it was pruned: zeros for what is cut out of a pruned kernel, whose
        inputs then do not matter, so that they may have the values of the model."""
        if path not in self._pruned:
            return np.asarray(self._job.checkpoint.read(path), order="C")
        shape, dtype = self._job.checkpoint.shapes[path].shape, self._job.checkpoint.shapes[path].dtype
        whole = np.zeros(shape, dtype)
        whole[positions.mask(shape, self._job.cut.get(path, {}))] = self._writer.read(path).reshape(-1)
        return whole

    def keep(self, checksums: Mapping[str, int]) -> bool:
        """Whether the files hold what an earlier process wrote; see `huggingface.Writer.keep`."""
        return self._writer.keep(checksums)

    def sync(self, paths: Iterable[str]) -> None:
        """Returns when these parameters are on the disk."""
        self._writer.sync(paths)

    def close(self) -> None:
        """Completes the files."""
        self._writer.close()
