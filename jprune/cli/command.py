"""What the commands have in common."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has."""

    model: tyro.conf.Positional[str]
    """Hugging Face hub id, local folder, .safetensors or .gguf file, Orbax folder, or "demo", which is
    SmolLM2-135M-Instruct."""
    json: bool = False
    """Make the last line of stdout one JSON object, and print nothing else there."""
