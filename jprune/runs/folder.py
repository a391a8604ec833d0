"""The run folder: what a run needs to go on after it was killed, at any moment.

    run.json          what the run is of (its fingerprint), and what was decided for it
    lock              who is at work
    done/<unit>.json  one mark for each unit that is done: its report, and checksums of what it wrote
    hidden/<n>.bin    the activations before unit n, and beside them their checksums; with several processes each has
                      its own, in a folder of its own
    spill/            what did not fit into memory; worth nothing after the process

The result grows beside `out`, in a hidden folder, and is renamed when it is complete. A mark is written after all that
it speaks of has reached the disk, and whole: under another name, synced, and renamed. So whatever is found is true, and
whatever is not found is done again, to the same bits: what a unit computes depends on nothing but its inputs and on
what run.json says.
"""

import contextlib
import json
import secrets
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jprune import settings
from jprune.checkpoints import writing
from jprune.errors import JpruneError
from jprune.runs import lock, processes

FORMAT_VERSION = 2
FINISHED = "finished"
"""The mark of a run whose result is complete, and only lacks its name."""
_RUN = "run.json"


def default_folder(out: Path) -> Path:
    """Where a run is kept unless the user says otherwise: beside its result."""
    return out.with_name(f"{out.name}.run")


def finished(folder: Path, out: Path) -> bool:
    """Whether a run was cut short between giving `out` its name and removing its folder; if so, removes it.

    Raises:
      JpruneError: the folder is in use.
    """
    if (state := read_mark(folder / _RUN)) is None:
        return False
    partial = out.with_name(f".{out.name}.{state['id']}.partial")
    if partial.exists() or not out.exists() or not (folder / "done" / f"{FINISHED}.json").exists():
        return False
    ours = lock.Lock(folder)
    shutil.rmtree(partial.with_suffix(".old"), ignore_errors=True)
    remove(folder)
    ours.release()
    return True


@contextlib.contextmanager
def state_folder(folder: Path, *, forget: bool = False) -> Iterator[None]:
    """A folder for a run whose state is not a `RunFolder`, locked as long as the context lasts.

    Args:
      folder: made if it is not there.
      forget: remove what an earlier run (known by its `jprune.settings`) has left in it.

    Raises:
      JpruneError: the folder is in use, or cannot be made.
    """
    ours = _locked(folder)
    try:
        if forget and (folder / settings.NAME).exists():
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != lock.NAME:
                    path.unlink()
        yield
    finally:
        ours.release()


def remove(folder: Path) -> None:
    """Removes the folder of a run, under another name: half of one, left by a kill, would be taken for a run."""
    gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.gone")
    try:
        folder.rename(gone)
    except OSError:  # a mount point, say
        gone = folder
    shutil.rmtree(gone, ignore_errors=True)


class RunFolder:
    """The folder of one run, locked as long as the object lives (`close`, `remove`).

    Of several processes the first locks it and writes; the others learn from it what it says.

    Args:
      folder: made if it is not there.
      out: the result's folder.
      fingerprint: by a name that the user understands, everything that the result depends on; JSON.
      resume: go on with the run that is there; if none is there, begin.
      overwrite: if a run is there and is not resumed, begin anew.

    Attributes:
      resumed: whether a run was there to go on with.
      partial: folder in which the result grows.

    Raises:
      JpruneError: the folder is in use, holds a run of something else (the first difference is named), or one that
        nobody asked to resume or to drop; it holds other things; it cannot be written.
    """

    def __init__(
        self, folder: Path, *, out: Path, fingerprint: Mapping[str, Any], resume: bool = False, overwrite: bool = False
    ):
        self.folder = folder
        self._lock: lock.Lock | None = None
        fingerprint = settings.as_json({"out": str(out.resolve()), **fingerprint})
        self._state, self.resumed = processes.decided_by_first(lambda: self._open(fingerprint, resume, overwrite))
        self.partial = out.with_name(f".{out.name}.{self._state['id']}.partial")
        self.old = self.partial.with_suffix(".old")
        try:
            with processes.run_together(), writing.explained(folder):
                for path in (self.hidden, self.spill):
                    path.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self._release()
            raise

    def _open(self, fingerprint: Mapping[str, Any], resume: bool, overwrite: bool) -> tuple[dict[str, Any], bool]:
        """Locks the folder and makes it ready; returns what run.json says, and whether there is a run to go on with."""
        folder = self.folder
        self._lock = _locked(folder, known={_RUN, f".{_RUN}.tmp", lock.NAME, "done", "hidden", "spill"})
        try:
            before = self._read()
            if before and not (resume or overwrite):
                raise JpruneError(
                    f"{folder} holds a run that was interrupted after {self._count()} of its parts; go on with it by "
                    "`resume`, drop it by `overwrite`, or remove the folder"
                )
            if before and resume:
                settings.check_same(folder, before["fingerprint"], fingerprint)
                state = before
            else:
                self._clear(before)
                state = {
                    "format_version": FORMAT_VERSION,
                    "id": secrets.token_hex(4),
                    "fingerprint": fingerprint,
                    "decisions": {},
                }
                self._write(state)
            with writing.explained(folder):
                shutil.rmtree(folder / "spill", ignore_errors=True)
                (folder / "done").mkdir(exist_ok=True)
        except BaseException:
            self._release()
            raise
        return state, bool(before and resume)

    @property
    def hidden(self) -> Path:
        """Folder of the activations between units, as far as this process has them."""
        return self.folder / "hidden" / processes.own_part()

    @property
    def spill(self) -> Path:
        """Folder of what did not fit into the memory of this process."""
        return self.folder / "spill" / processes.own_part()

    def decide(self, decisions: Mapping[str, Any]) -> dict[str, Any]:
        """What was decided when the run began; `decisions` of the first process, if it begins now. JSON."""
        if not self._state["decisions"]:
            self._state["decisions"] = processes.gathered(settings.as_json(decisions))[0]
            if processes.is_first():
                self._write(self._state)
        return self._state["decisions"]

    def mark(self, name: str, contents: Mapping[str, Any]) -> None:
        """Says durably that a part is done. What it wrote must have been synced before."""
        if processes.is_first():
            with writing.explained(self.folder):
                write_mark(self._mark(name), contents)

    def marked(self, name: str) -> dict[str, Any] | None:
        """The contents of a mark; None if the part is not done, or its mark is damaged."""
        return read_mark(self._mark(name))

    def close(self) -> str:
        """Leaves the run for a later process, or nothing if nothing of it is done; says which."""
        if (parts := self._count()) == 0:
            self.remove()
            return "nothing was written"
        shutil.rmtree(self.spill, ignore_errors=True)
        self._release()
        return f"{parts} parts of the run are done and kept in {self.folder}: go on with the same command and `resume`"

    def remove(self) -> None:
        """Removes the folder, and what has grown of the result: the run is over."""
        if not processes.is_first():
            return
        for path in (self.folder / "spill", self.folder / "hidden", self.partial, self.old):
            shutil.rmtree(path, ignore_errors=True)
        remove(self.folder)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / _RUN
        if not path.exists():
            return None
        if (state := read_mark(path)) is None or state["format_version"] != FORMAT_VERSION:
            raise JpruneError(
                f"{path} is damaged, or of another version of jprune; remove {self.folder}, or use that version"
            )
        return state

    def _write(self, state: Mapping[str, Any]) -> None:
        with writing.explained(self.folder):
            write_mark(self.folder / _RUN, state)

    def _clear(self, before: Mapping[str, Any] | None) -> None:
        """Removes what an earlier run left, its partial result too."""
        if before:
            out = Path(before["fingerprint"]["out"])
            for suffix in (".partial", ".old"):
                shutil.rmtree(out.with_name(f".{out.name}.{before['id']}{suffix}"), ignore_errors=True)
        for name in ("done", "hidden", "spill"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _count(self) -> int:
        return sum(1 for _ in (self.folder / "done").glob("*.json"))

    def _mark(self, name: str) -> Path:
        return self.folder / "done" / f"{name.replace('/', '-')}.json"


def _locked(folder: Path, known: Collection[str] | None = None) -> lock.Lock:
    """The lock of a folder, which is made if it is not there; refused if it holds more than what is known of a run."""
    with writing.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        strangers = sorted(path.name for path in folder.iterdir() if known is not None and path.name not in known)
        if strangers:
            raise JpruneError(
                f"`run` {folder} holds {strangers[0]!r}, which jprune did not write; choose another folder"
            )
        return lock.Lock(folder)


def write_mark(path: Path, contents: Any) -> None:
    """Writes a mark: JSON that is there whole, and known to be, or not at all."""
    whole = {"checksum": zlib.crc32(json.dumps(contents).encode()), "contents": contents}
    writing.replace(path, json.dumps(whole).encode())


def read_mark(path: Path) -> Any:
    """What a mark says; None if it is not there, or damaged."""
    try:
        whole = json.loads(path.read_bytes())
        intact = zlib.crc32(json.dumps(whole["contents"]).encode()) == whole["checksum"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return whole["contents"] if intact else None
