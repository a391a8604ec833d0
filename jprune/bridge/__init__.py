"""Models without a table: PyTorch's own module as JAX functions, a block at a time.

The other road of `jprune.models`, for every causal language model that transformers has. The module is made on the meta
device, traced once through torchax, and its jaxpr is cut where one decoder layer ends and the next begins. What comes
of it is a `jprune.models.blocks.InBlocks`, as of a native model, and the pipeline knows no difference.

    environment  torchax: what it needs to load, its operators, and how what it lacks is refused
    experts      experts as products of all tokens with all experts, of which each reads what it is sent
    scans        Mamba's recurrence as one loop
    module       the module without weights, its decoder layers, and one traced call of it
    cut          a jaxpr in parts: before the layers, each layer, and behind them
    model        these parts as functions of parameters by path
    names        the tensors of a checkpoint's files as parameters of the module, and back

This is the only room that knows torch, and `open_model` is its only door. It needs torch and torchax (`pip install
jprune[torch]`), which are imported when a model without a table is opened.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jprune.errors import JpruneError
from jprune.packages import require

if TYPE_CHECKING:
    from jprune.bridge.model import Model


def open_model(
    hf_config: Mapping[str, Any], source: str, why: str, given: Mapping[str, tuple[int, ...]] | None = None
) -> "Model":
    """The model that a config.json describes, by PyTorch's module; it has no weights.

    Args:
        hf_config: the content of config.json.
        source: where it was found, for messages.
        why: the reason why it has no native table, for messages.
        given: the shapes of the tensors in its files, by their names there; those of config.json unless given.

    Raises:
        JpruneError: torch or torchax is not installed; transformers has no such causal language model; its layers are
            not found; an operator has no counterpart in JAX; a layer cannot stand alone; or the files do not fit it.
    """
    for package in ("torch", "torchax"):
        try:
            require(package)
        except ImportError as error:
            raise JpruneError(
                f"{why}. Other models go through PyTorch's module, for which {package} must be installed: "
                "pip install 'jprune[torch]'"
            ) from error
    from jprune.bridge.model import Model

    return Model(hf_config, source, why, given)
