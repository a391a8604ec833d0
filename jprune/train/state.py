"""The state of a training run on disk: Orbax checkpoints (v1 API) that appear whole or not at all.

    settings.json          what the run depends on; a run is resumed with the same or not at all
    step-00000120/         the state after 120 steps: trainable parameters, optimizer, place in the data
    best-00000100/         the trainable parameters with the lowest evaluation loss so far
    metrics.jsonl          see `jprune.train.metrics`

Trees are stored as their leaves in order; whoever restores them knows their structure. Orbax writes into a folder of
another name and renames it when everything is there; what a kill leaves is removed at the next start.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jprune.errors import JpruneError
from jprune.packages import require
from jprune.settings import begin_or_resume

PyTree = Any

_STATE, _BEST = re.compile(r"^step-(\d+)$"), re.compile(r"^best-(\d+)$")
_KEPT = 2  # the one before the last, should the disk have lost the last


class StateFolder:
    """A folder with the state of one run.

    Args:
      path: the folder; made if it is not there.
      settings: what the result depends on, as JSON.
      resume: go on where the run in the folder has stopped, if there is one.

    Raises:
      JpruneError: there is a run already and it is not to be resumed, or it has other settings (the first that differs
        is named).
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool):
        require("orbax.checkpoint")
        self.path = path.resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JpruneError(f"{path}: no folder for the state of the run can be made there: {error}") from error
        begin_or_resume(path, settings, resume=resume)
        for left in self.path.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    def save(self, step: int, state: PyTree, about: Mapping[str, Any]) -> None:
        """Keeps the state after `step` steps, and `about`, a JSON object."""
        self._write(f"step-{step:08}", state, about)
        self._keep(_STATE, _KEPT)

    def save_best(self, step: int, trainable: PyTree, about: Mapping[str, Any]) -> None:
        """Keeps the trainable parameters after `step` steps instead of the best before."""
        self._write(f"best-{step:08}", trainable, about)
        self._keep(_BEST, 1)

    def steps(self) -> list[int]:
        """The steps whose states are kept, ascending."""
        return _numbers(self.path, _STATE)

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The state after `step` steps, with structure, dtypes and shardings of `like`, and what was said about it."""
        return self._read(f"step-{step:08}", like)

    def restore_best(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The best trainable parameters, and what was said about them.

        Raises:
          JpruneError: none were kept.
        """
        found = _numbers(self.path, _BEST)
        if not found:
            raise JpruneError(f"{self.path}: no best state is kept there; resume the run, or begin anew")
        return self._read(f"best-{found[-1]:08}", like)

    def _write(self, name: str, tree: PyTree, about: Mapping[str, Any]) -> None:
        from orbax.checkpoint import v1 as ocp

        if (self.path / name).exists():  # the same state: a run resumed from it has stopped at once
            shutil.rmtree(self.path / name)
        ocp.save(self.path / name, _numbered(tree), custom_metadata=dict(about))

    def _read(self, name: str, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        from orbax.checkpoint import v1 as ocp

        path = self.path / name
        try:
            wanted = jax.tree.map(_abstract, _numbered(like))
            leaves = ocp.load(path, wanted)
            about = ocp.metadata(path).custom_metadata
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise JpruneError(
                f"{path}: the checkpoint cannot be read ({reason}); remove it, and the one before is used"
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[key] for key in sorted(leaves)]), dict(about or {})

    def _keep(self, kind: re.Pattern[str], count: int) -> None:
        prefix = kind.pattern[1:5]
        for number in _numbers(self.path, kind)[:-count]:
            shutil.rmtree(self.path / f"{prefix}-{number:08}", ignore_errors=True)


def _numbered(tree: PyTree) -> dict[str, Any]:
    return {f"{i:06}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _numbers(path: Path, kind: re.Pattern[str]) -> list[int]:
    return sorted(int(found[1]) for entry in path.iterdir() if (found := kind.match(entry.name)))
