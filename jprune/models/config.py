"""What the decoder must know that is not a shape, and the sizes of a model that is not loaded yet.

The forward pass reads every size from its arrays (structured surgery changes parameters and nothing else); the sizes
here serve to say what a checkpoint must contain, and to build abstract or random models. Layers may differ in their
heads and feed-forward widths, as structured pruning leaves them.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from jprune.errors import JpruneError
from jprune.models.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
NORMS = ("rms", "layer")
QK_NORMS = ("shared", "own", "joint")


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
    equal become those three, so that configs of equal models are equal. The fields below the sizes are the options in
    which families differ; their defaults are Llama's.
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
    tied: bool = False  # the head is the embedding, transposed

    # Positions
    rope: Rope | None = field(default_factory=Rope)  # None: queries and keys are not turned
    ropes: tuple[Rope | None, ...] = ()  # of each layer, where they differ; see `rope_of`
    positions: int = 0  # rows of a table of learned positions that are added to the embedding; 0: there is none
    position_offset: int = 0  # the table's row of the first position
    alibi: bool = False  # scores fall with distance, with a slope per head (arXiv:2108.12409)
    windows: tuple[int | None, ...] = ()  # sliding window of each layer in tokens, None: all earlier tokens

    # Norms
    norm: str = "rms"  # or "layer": the mean is subtracted too
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_offset: bool = False  # scales are stored less one
    pre_norm: bool = True  # attention and MLP read the residual stream through a norm
    post_norm: bool = False  # their outputs are normalised before they are added to it
    norm_after: bool = False  # the (pre-)norms come after the addition instead: the original Transformer's order
    final_norm: bool = True
    embed_norm: bool = False  # the embedding is normalised
    qk_norm: bool = False  # queries and keys are normalised over head_dim, before the rotation
    qk_norm_kind: str = "shared"  # scales: "shared" by all heads, each head's "own", or "joint": normalised together
    qk_norm_bias: bool = False

    # Attention and MLP
    activation: str = "silu"
    gated: bool = True  # down(activation(gate(x)) * up(x)); else down(activation(up(x)))
    parallel: bool = False  # attention and MLP both read what enters the block
    shared_norm: bool = False  # of parallel ones: they read it through one norm
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False

    # Experts; 0 where every layer has one MLP
    experts: int = 0
    experts_per_token: int = 0
    d_expert: int = 0  # width of one of them
    d_shared: int = 0  # width of the expert that sees every token; 0: there is none
    normalise_routing: bool = False  # the weights of a token's experts sum to one
    dense_layers: tuple[int, ...] = ()  # layers that have one MLP all the same

    # Numbers
    score_scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    score_cap: float | None = None  # scores s become cap * tanh(s / cap)
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    logit_cap: float | None = None

    d_embed: int | None = None  # width of the embedding, where it is projected to d_model, and back before the head
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
        if self.experts and not (1 <= self.experts_per_token <= self.experts and self.d_expert >= 1):
            raise JpruneError(
                f"{self.architecture}: {self.experts_per_token} of {self.experts} experts of width {self.d_expert} for "
                "each token; expected at least one, no more than there are, and a width"
            )
        for name, known in (("activation", ACTIVATIONS), ("norm", NORMS), ("qk_norm_kind", QK_NORMS)):
            if (value := getattr(self, name)) not in known:
                raise JpruneError(f"{self.architecture}: unsupported {name} {value!r}; supported: {', '.join(known)}")
        if self.ropes and len(self.ropes) != self.layers:
            raise JpruneError(f"{self.architecture}: {len(self.ropes)} rotary embeddings for {self.layers} layers")
        for rope in (self.rope, *self.ropes):
            dims = self.head_dim if rope is None or rope.dims is None else rope.dims
            if rope is not None and (dims % 2 or not 0 < dims <= self.head_dim):
                raise JpruneError(
                    f"{self.architecture}: rotary embeddings need an even head_dim, or an even part of it; "
                    f"got {dims} of {self.head_dim}"
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

    def rope_of(self, index: int) -> Rope | None:
        """The rotary embedding of one layer."""
        return self.ropes[index] if self.ropes else self.rope

    def has_experts(self, index: int) -> bool:
        """Whether a layer routes its tokens to experts."""
        return bool(self.experts) and index not in self.dense_layers

    def size(self, axis: str, path: str) -> int:
        """The length of an axis (a name that `parameters` gives) of the parameter at a path."""
        if axis == "group":  # query heads of a key/value head
            return self.size("heads", path) // self.size("kv_heads", path)
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
        **_norm(config, "attn_norm", when=config.pre_norm),
        "attn/q/kernel": "d_model heads head_dim",
        "attn/k/kernel": "d_model kv_heads head_dim",
        "attn/v/kernel": "d_model kv_heads head_dim",
        "attn/o/kernel": "heads head_dim d_model",
        **_norm(config, "attn_post_norm", when=config.post_norm),
        **_norm(config, "mlp_norm", when=config.pre_norm and not config.shared_norm),
        **_norm(config, "mlp_post_norm", when=config.post_norm),
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
        for name, heads in (("q_norm", "heads"), ("k_norm", "kv_heads")):
            axes = "head_dim" if config.qk_norm_kind == "shared" else f"{heads} head_dim"
            block |= {f"attn/{name}/scale": axes}
            block |= {f"attn/{name}/bias": axes} if config.qk_norm_bias else {}
    width = "d_model" if config.d_embed is None else "d_embed"
    model = {"embed/embedding": f"vocab {width}"}
    if config.d_embed is not None:
        model |= {"embed/project_in/kernel": "d_embed d_model"}
    if config.positions:
        model |= {"embed/positions": "positions d_model"}
    model |= _norm(config, "embed/norm", when=config.embed_norm)
    for i in range(config.layers):
        mlp = _experts(config) if config.has_experts(i) else _mlp(config)
        model |= {f"blocks/{i}/{path}": names for path, names in (block | mlp).items()}
    model |= _norm(config, "final_norm", when=config.final_norm)
    if config.d_embed is not None:
        model |= {"project_out/kernel": "d_model d_embed"}
    if not config.tied:
        model |= {"head/kernel": f"{width} vocab"}
    if config.head_bias:
        model |= {"head/bias": "vocab"}
    return {path: tuple(names.split()) for path, names in model.items()}


def _mlp(config: DecoderConfig) -> dict[str, str]:
    mlp = {
        "mlp/gate/kernel": "d_model d_ff",
        "mlp/up/kernel": "d_model d_ff",
        "mlp/down/kernel": "d_ff d_model",
    }
    if config.mlp_bias:
        mlp |= {"mlp/gate/bias": "d_ff", "mlp/up/bias": "d_ff", "mlp/down/bias": "d_model"}
    return {path: axes for path, axes in mlp.items() if config.gated or not path.startswith("mlp/gate/")}


def _experts(config: DecoderConfig) -> dict[str, str]:
    mlp = {
        "mlp/router/kernel": "d_model experts",
        "mlp/experts/gate/kernel": "experts d_model d_expert",
        "mlp/experts/up/kernel": "experts d_model d_expert",
        "mlp/experts/down/kernel": "experts d_expert d_model",
    }
    if config.d_shared:
        mlp |= {
            "mlp/shared_gate/kernel": "d_model",
            "mlp/shared/gate/kernel": "d_model d_shared",
            "mlp/shared/up/kernel": "d_model d_shared",
            "mlp/shared/down/kernel": "d_shared d_model",
        }
    return mlp


def _norm(config: DecoderConfig, name: str, *, when: bool = True) -> dict[str, str]:
    """The parameters of a norm over d_model, or none."""
    names = ("scale", "bias") if config.norm_bias else ("scale",)
    return {f"{name}/{kind}": "d_model" for kind in names} if when else {}


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    return {path: tuple(config.size(name, path) for name in names) for path, names in parameters(config).items()}


def block_kernels(config: DecoderConfig) -> dict[str, int]:
    """The kernels of the blocks, by path: how many of a kernel's axes are inputs. Routers and gates are left out.

    Those of experts are stacks, with an axis more in front (`is_stack`).
    """
    found = {}
    for path, axes in parameters(config).items():
        if path.startswith("blocks/") and path.endswith("/kernel") and not re.search("/(router|shared_gate)/", path):
            found[path] = 2 if axes[0] == "heads" else 1
    return found


def is_stack(path: str) -> bool:
    """Whether the parameter at a path is a stack of kernels, of one for each expert."""
    return "/experts/" in path
