"""The names of the files in a Hugging Face folder."""

from pathlib import Path

WHOLE = "model.safetensors"
"""All tensors in one file."""
INDEX = "model.safetensors.index.json"
"""Which shard holds which tensor."""


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, as `Writer` names them, and their index."""
    return [*sorted(folder.glob("model*.safetensors")), *folder.glob(INDEX)]
