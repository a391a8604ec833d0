"""One process at a time in a run folder.

The kernel's own lock (`flock`) is the truth on one machine: it goes when the process goes, however it went, whatever
the clock says and whoever has its process id by now. The file's content, the holder's host and process id, is for
people, and for file systems that machines share: a lock that another machine left is not taken over, because from here
nobody can tell whether its holder lives.
"""

import json
import os
import socket
from pathlib import Path

from jprune.errors import JpruneError

NAME = "lock"


class Lock:
    """Holds a folder from its making until `release`.

    Raises:
      JpruneError: somebody else holds the folder; says who.
    """

    def __init__(self, folder: Path):
        import fcntl

        self._path = folder / NAME
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise JpruneError(
                    f"{folder} is in use by {_words(holder)}; wait for it, or choose another `run`"
                ) from None
            if _same_file(descriptor, self._path):
                break
            os.close(descriptor)  # the holder has just removed it, and its folder, as finished runs do
        holder = _holder(descriptor)
        if holder and holder.get("host") != socket.gethostname():
            os.close(descriptor)
            raise JpruneError(
                f"{folder} is in use by {_words(holder)}, or was when that died, which cannot be seen from here; "
                f"if it is dead, remove {self._path} and try again"
            )
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)

    def release(self) -> None:
        """Lets the next one in; the folder may be gone."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _holder(descriptor: int) -> dict:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty: nobody, or somebody who has not signed yet
        return {}
    return holder if isinstance(holder, dict) else {}


def _words(holder: dict) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'this machine')}"


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
