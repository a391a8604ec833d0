"""The formats a checkpoint can be written in, and which loader takes which.

    hf        a plain Hugging Face folder; transformers, vLLM and llama.cpp's converter load it. All layers equal.
    jprune    the same, with `per_layer_config` in config.json where layers differ; transformers refuses those
    decilm    `DeciLMForCausalLM`, for vLLM; feed-forward widths and key/value heads may differ between layers
    orbax     an Orbax pytree in jprune's layout; layers may differ
    packed    kernels without their zeros (`jprune.checkpoints.packed`), for jprune; layers may differ

What a format cannot hold is refused before anything is written.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

import jax
import numpy as np

from jprune.checkpoints import huggingface, orbax, packed
from jprune.checkpoints.checkpoint import Checkpoint
from jprune.checkpoints.huggingface import decilm
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.config import DecoderConfig, named_sizes

Format = Literal["hf", "jprune", "decilm", "orbax", "packed"]
WHOLE: tuple[Format, ...] = ("orbax", "packed")
"""The formats that are written at once: a run that may be interrupted writes a Hugging Face folder on the way."""
_GROUPED = 16
"""Bytes that the rows of a kernel are a multiple of, where PyTorch multiplies those of all experts at once."""
# What transformers 5.23 does with sizes, beyond what its documentation says.
_HEAD_DIM = ("PhiForCausalLM", "Phi3ForCausalLM", "CohereForCausalLM")  # head_dim is no key of theirs, but is read
_DIVIDED = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")  # heads must divide hidden_size though head_dim is given


class Writer(Protocol):
    """Takes parameters one by one, in any order; `close`, or the end of a `with`, completes the folder."""

    def write(self, path: str, array: np.ndarray | jax.Array) -> Any:
        """Writes one parameter."""
        ...

    def close(self) -> None:
        """Completes the folder."""
        ...

    def __enter__(self) -> "Writer": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def write(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    format: Format = "hf",
    dtypes: Mapping[str, Any] | None = None,
    saturate: bool = False,
) -> tuple[str, ...]:
    """Writes a whole checkpoint, such as a view, tensor by tensor (orbax: in parts).

    Args:
        folder: an empty folder.
        checkpoint: what to write.
        format: one of `Format`.
        dtypes: the dtype of each parameter in the file, by path; those not named keep theirs.
        saturate: numbers beyond the range of their dtype become its largest, instead of being refused.

    Returns:
        What a user should know of the result (see `notices`).

    Raises:
        JpruneError: the format cannot hold this model, a dtype its numbers, or the folder cannot be written.
    """
    with writer(folder, checkpoint, format=format, dtypes=dtypes, saturate=saturate) as out:
        for path in checkpoint.shapes:
            out.write(path, checkpoint.read(path))
    return notices(checkpoint, format)


def writer(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    format: Format = "hf",
    dtypes: Mapping[str, Any] | None = None,
    saturate: bool = False,
    **options: Any,
) -> Writer:
    """A writer for parameters of `checkpoint`'s shapes; arguments and errors are those of `write`.

    `options` are those of the format's own writer, and go to it.
    """
    restated = _restated(checkpoint, format)
    if format == "orbax":
        return orbax.Writer(folder, restated, dtypes, saturate=saturate)
    if format == "packed":
        from jprune.checkpoints.packed.write import Writer  # with the kernels, for which others need not wait

        return Writer(folder, restated, dtypes, saturate=saturate, **options)
    return huggingface.Writer(folder, restated, dtypes, saturate=saturate, **options)


def discard(folder: Path) -> None:
    """Removes what an earlier process left of the formats in `WHOLE`, finished or not."""
    orbax.discard(folder)
    packed.discard(folder)


def check(checkpoint: Checkpoint, format: Format) -> None:
    """Raises JpruneError, with what to do instead, if the format cannot hold this model."""
    _restated(checkpoint, format)


def notices(checkpoint: Checkpoint, format: Format) -> tuple[str, ...]:
    """What a user should know of a model in this format: a line each."""
    if checkpoint.road != "native":
        return ()
    if format == "decilm":
        return ("vLLM loads this folder with --trust-remote-code, which runs its configuration_decilm.py",)
    if format == "jprune" and not checkpoint.config.uniform:
        return ("layers differ in size, so only jprune loads this folder",)
    if format == "packed":
        return ("kernels are packed, so only jprune loads this folder; `jprune convert` unpacks it",)
    if format == "hf" and _is_llama_in_name_only(checkpoint.config):
        return (
            "written as MistralForCausalLM, which computes the same: transformers wants a Llama's num_attention_heads "
            f"({checkpoint.config.heads}) to divide its hidden_size ({checkpoint.config.d_model})",
        )
    return _narrow_experts(checkpoint) if format == "hf" else ()


def _narrow_experts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A notice, if PyTorch's product of sorted rows (`torch._grouped_mm`) does not take the kernels of experts."""
    found = (leaf for path, leaf in checkpoint.shapes.items() if path.endswith("/experts/down/kernel"))
    itemsize = next((leaf.dtype.itemsize for leaf in found), 16)
    if not checkpoint.config.experts or checkpoint.config.d_expert * itemsize % _GROUPED == 0:
        return ()
    return (
        f"experts are {checkpoint.config.d_expert} wide, no multiple of {_GROUPED // itemsize}, so transformers loads "
        'them but computes with experts_implementation="batched_mm" or "eager" alone; prune with such a `round_to`',
    )


def _restated(checkpoint: Checkpoint, format: Format) -> Checkpoint:
    """The checkpoint with the config.json and files that the format has."""
    if format not in get_args(Format):
        raise JpruneError(f"unknown format {format!r}; there are {', '.join(get_args(Format))}")
    if checkpoint.road != "native":
        if format != "hf":
            raise JpruneError(
                f"{checkpoint.architecture} has no table in jprune, and is written as a Hugging Face folder "
                f"alone, not as {format}; leave `format` out"
            )
        return checkpoint
    config = checkpoint.config
    if format == "decilm":
        return checkpoint.restated(decilm.stated(checkpoint.hf_config, config), decilm.files())
    if format == "hf" and not config.uniform:
        raise JpruneError(
            f"a plain Hugging Face folder has one size for all layers, and these differ: {_differences(config)}. "
            f"{_way_out(config)}"
        )
    if format == "hf":
        _check_derived(config)
        if _is_llama_in_name_only(config):
            return checkpoint.restated(_as_mistral(checkpoint.hf_config, config))
    return checkpoint


def _check_derived(config: DecoderConfig) -> None:
    """Refuses sizes that transformers takes from others and not from config.json."""
    family = families.ARCHITECTURES[config.architecture]

    def refused(why: str) -> JpruneError:
        return JpruneError(f"transformers' {config.architecture} {why}. Write `format` jprune, which jprune loads")

    reads_head_dim = "head_dim" in family.defaults or config.architecture in _HEAD_DIM or config.kv_rank
    if not reads_head_dim and config.heads * config.head_dim != config.d_model:
        raise refused(
            f"makes its heads hidden_size / num_attention_heads wide, but hidden_size is {config.d_model} here, with "
            f"{config.heads} heads of {config.head_dim}: prune neither heads nor hidden dimensions"
        )
    width = family.names.get("intermediate_size", "intermediate_size")
    if width not in family.defaults and config.d_ff != 4 * config.d_model:
        raise refused(f"is 4 * hidden_size = {4 * config.d_model} wide in its feed-forward part, not {config.d_ff}")
    if config.architecture in _DIVIDED and config.d_model % config.heads:
        raise refused(f"wants num_attention_heads ({config.heads}) to divide hidden_size ({config.d_model})")


def _way_out(config: DecoderConfig) -> str:
    if config.experts and len({layer.experts for layer in config.sizes}) > 1:
        return "Leave out `globally` for as many experts in every layer, or write `format` jprune, which jprune loads"
    uniform = "Prune with `uniform` for equal sizes in all layers, or write `format` jprune, which jprune loads"
    return uniform if config.experts else f"{uniform}, or `format` decilm, which vLLM loads"


def _differences(config: DecoderConfig) -> str:
    """How the first layer differs from the next one that does."""
    pair = 0, next(i for i in range(config.layers) if config.layer(i) != config.layer(0))
    if len({config.layer(i).experts for i in pair}) > 1:
        return ", ".join(f"layer {i} has {config.layer(i).experts} experts" for i in pair)
    said = []
    for i in pair:
        sizes = named_sizes(config, i)
        words = [f"{sizes.pop('heads')} query heads", f"{sizes.pop('kv_heads')} key/value heads"]
        *most, last = words + [f"{name} {size}" for name, size in sizes.items()]
        said.append(f"layer {i} has {', '.join(most)} and {last}")
    return ", ".join(said)


def _is_llama_in_name_only(config: DecoderConfig) -> bool:
    """Whether transformers' Llama refuses this model: it wants the heads to divide the hidden size even where head_dim
    says how large a head is (5.23, `LlamaConfig.validate_architecture`)."""
    return config.architecture == "LlamaForCausalLM" and config.d_model % config.heads != 0


def _as_mistral(hf_config: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The same model as a Mistral without sliding window, where no such rule holds."""
    if config.qkv_bias or config.o_bias or config.mlp_bias:
        raise JpruneError(
            f"transformers wants a Llama's hidden_size ({config.d_model}) to be a multiple of its num_attention_heads "
            f"({config.heads}), and Mistral, which has no such rule, has no biases. Keep a number of heads that "
            "divides hidden_size, or write `format` jprune, which jprune loads"
        )
    hf = families.explicit(hf_config)
    hf = {key: value for key, value in hf.items() if key not in ("attention_bias", "mlp_bias", "pretraining_tp")}
    return hf | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "sliding_window": None,
    }
