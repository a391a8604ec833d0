"""Model files: Hugging Face safetensors, GGUF and Orbax, read lazily and written as a stream."""

from jprune.checkpoints.checkpoint import Checkpoint, load

__all__ = ["Checkpoint", "load"]
