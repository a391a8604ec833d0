"""What the decoder must know that is not a shape, and the sizes of a model that is not loaded yet.

The forward pass reads every size from its arrays (structured surgery changes parameters and nothing else); the sizes
here serve to say what a checkpoint must contain, and to build abstract or random models. Layers may differ in their
heads and feed-forward widths, as structured pruning leaves them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from jprune.errors import JpruneError
from jprune.models.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class LayerSizes:
    """What layers may differ in."""

    heads: int  # query heads
    kv_heads: int
    d_ff: int


LAYER_SIZES = tuple(LayerSizes.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder-only language model; built from a config.json by `jprune.models.families.config`.

    `heads`, `kv_heads` and `d_ff` hold for every layer unless `sizes` gives them layer by layer. Sizes that are all
    equal become those three, so that configs of equal models are equal.
    """

    architecture: str  # as in config.json, e.g. "LlamaForCausalLM"
    vocab: int
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    context: int  # longest sequence the model was made for
    rope: Rope = field(default_factory=Rope)
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False  # the head is the embedding, transposed
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys, before the rotation
    windows: tuple[int | None, ...] = ()  # sliding window of each layer in tokens, None: all earlier tokens
    sizes: tuple[LayerSizes, ...] = ()  # of each layer; empty where all layers are equal

    def __post_init__(self) -> None:
        if self.sizes and len(set(self.sizes)) == 1 and len(self.sizes) == self.layers:
            for name in LAYER_SIZES:
                object.__setattr__(self, name, getattr(self.sizes[0], name))
            object.__setattr__(self, "sizes", ())
        for name in ("vocab", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff", "context"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise JpruneError(f"{self.architecture}: {name} must be a positive integer, got {size!r}")
        if self.heads % self.kv_heads:
            raise JpruneError(
                f"{self.architecture}: {self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                "check num_attention_heads and num_key_value_heads in config.json"
            )
        self._check_sizes()
        if self.head_dim % 2:
            raise JpruneError(f"{self.architecture}: rotary embeddings need an even head_dim, got {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise JpruneError(
                f"{self.architecture}: unsupported activation {self.activation!r}; supported: {', '.join(ACTIVATIONS)}"
            )
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        if len(self.windows) != self.layers or any(w is not None and w < 1 for w in self.windows):
            raise JpruneError(
                f"{self.architecture}: expected one sliding window (None or >= 1) for each of {self.layers} layers, "
                f"got {self.windows}"
            )

    def _check_sizes(self) -> None:
        if self.sizes and len(self.sizes) != self.layers:
            raise JpruneError(
                f"{self.architecture}: expected the sizes of each of {self.layers} layers, or none; "
                f"got those of {len(self.sizes)}"
            )
        for i, layer in enumerate(self.sizes):
            for name in LAYER_SIZES:
                if not isinstance(size := getattr(layer, name), int) or size < 1:
                    raise JpruneError(
                        f"{self.architecture}, layer {i}: {name} must be a positive integer, got {size!r}"
                    )
            if layer.heads % layer.kv_heads:
                raise JpruneError(
                    f"{self.architecture}, layer {i}: {layer.heads} query heads cannot share {layer.kv_heads} "
                    "key/value heads evenly; every key/value head needs equally many query heads"
                )

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        return not self.sizes

    def layer(self, index: int) -> LayerSizes:
        """The sizes of one layer."""
        return self.sizes[index] if self.sizes else LayerSizes(self.heads, self.kv_heads, self.d_ff)

    def size(self, axis: str, path: str) -> int:
        """The length of an axis (a name that `parameters` gives) of the parameter at a path."""
        if axis in LAYER_SIZES and path.startswith("blocks/"):
            return getattr(self.layer(int(path.split("/")[1])), axis)
        return getattr(self, axis)


def describe(config: DecoderConfig) -> dict[str, Any]:
    """All sizes as plain values for JSON: `vocab`, `d_model`, `head_dim`, and heads and widths of every layer."""
    return {
        "vocab": config.vocab,
        "d_model": config.d_model,
        "head_dim": config.head_dim,
        "layers": [asdict(config.layer(i)) for i in range(config.layers)],
    }


def parameters(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The path of every parameter of the model and the names of its axes; for their lengths see `shapes`."""
    block = {
        "attn_norm/scale": "d_model",
        "attn/q/kernel": "d_model heads head_dim",
        "attn/k/kernel": "d_model kv_heads head_dim",
        "attn/v/kernel": "d_model kv_heads head_dim",
        "attn/o/kernel": "heads head_dim d_model",
        "mlp_norm/scale": "d_model",
        "mlp/gate/kernel": "d_model d_ff",
        "mlp/up/kernel": "d_model d_ff",
        "mlp/down/kernel": "d_ff d_model",
    }
    if config.qkv_bias:
        block |= {
            "attn/q/bias": "heads head_dim",
            "attn/k/bias": "kv_heads head_dim",
            "attn/v/bias": "kv_heads head_dim",
        }
    if config.o_bias:
        block |= {"attn/o/bias": "d_model"}
    if config.qk_norm:
        block |= {"attn/q_norm/scale": "head_dim", "attn/k_norm/scale": "head_dim"}
    if config.mlp_bias:
        block |= {"mlp/gate/bias": "d_ff", "mlp/up/bias": "d_ff", "mlp/down/bias": "d_model"}
    axes = {"embed/embedding": "vocab d_model"}
    axes |= {f"blocks/{i}/{path}": names for i in range(config.layers) for path, names in block.items()}
    axes |= {"final_norm/scale": "d_model"}
    if not config.tied:
        axes |= {"head/kernel": "d_model vocab"}
    return {path: tuple(names.split()) for path, names in axes.items()}


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    return {path: tuple(config.size(name, path) for name in names) for path, names in parameters(config).items()}
