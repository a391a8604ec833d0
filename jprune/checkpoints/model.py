"""What readers and writers of files ask of a model, whoever made it: `jprune.checkpoints.Checkpoint` is one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jprune.checkpoints.source import Entry
from jprune.models.blocks import InBlocks
from jprune.models.config import DecoderConfig


class Model(Protocol):
    """What is written beside the weights, and which weights there must be."""

    @property
    def source(self) -> str:
        """What the model was loaded from."""
        ...

    @property
    def config(self) -> DecoderConfig:
        """What the decoder needs to know; there is nothing of a model that is not native."""
        ...

    @property
    def model(self) -> InBlocks:
        """The model's functions."""
        ...

    @property
    def table(self) -> Mapping[str, Entry]:
        """For every parameter by path: the Hugging Face tensors that store it, and how."""
        ...

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        ...

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter by path."""
        ...

    @property
    def side_files(self) -> dict[str, bytes]:
        """Tokenizer, generation config and licence, by file name."""
        ...


class Readable(Model, Protocol):
    """A model whose weights can be read as well."""

    @property
    def reads_together(self) -> bool:
        """Whether `read_many` is much cheaper than many times `read`."""
        ...

    def read(self, path: str) -> np.ndarray:
        """One parameter."""
        ...

    def read_many(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Several parameters by path."""
        ...

    def fingerprint(self) -> str:
        """A hash that tells this model from others."""
        ...
