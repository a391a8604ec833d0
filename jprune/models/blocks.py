"""A language model in blocks: all that passes over a model ask of its architecture, whoever computes it."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InBlocks:
    """Functions of parameters, from tokens to logits: what comes before the blocks, each block, and the head.

    Blocks that do not differ are one function object, so that jit compiles it once for all of them.
    """

    road: str
    """How it is computed: "native", or "PyTorch's module"."""
    architecture: str
    """As in config.json."""
    vocab: int
    d_model: int
    """Width of what passes from block to block."""
    context: int
    """Longest sequence the model was made for."""
    tied: bool
    """Whether the head reads the embedding and has no kernel of its own."""
    embed: Callable[..., Any]
    """f({"embed": ...}, tokens [B, T]) -> x [B, T, d_model]."""
    blocks: tuple[Callable[..., Any], ...]
    """f(params of blocks/<index>, x) -> x."""
    head: Callable[..., Any]
    """f(the subtrees in `head_parts`, x) -> logits [B, T, vocab] in float32."""
    head_parts: tuple[str, ...]
    """The subtrees of the parameters that `head` reads."""
    head_of: Callable[..., Any]
    """(Parameters of the head, first token, width) -> those for `width` tokens of the vocabulary."""
    dtype_of: Callable[[str, Any], Any]
    """(Path of a parameter, dtype of the model) -> its own: some stay float32 in models of fewer bits."""
    left_alone: re.Pattern[str]
    """Finds the paths of kernels that are pruned only where somebody asks for them."""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)
