"""What the decoder must know that is not a shape, and the sizes of a model that is not loaded yet.

The forward pass reads every size from its arrays (structured surgery changes parameters and nothing else); the sizes
here serve to say what a checkpoint must contain, and to build abstract or random models. Layers may differ in their
heads and feed-forward widths, as structured pruning leaves them.
"""

from dataclasses import dataclass, field
from typing import Any

from jprune.errors import JpruneError
from jprune.models.rope import Rope
from jprune.models.routing import SCORES, Routing

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
NORMS = ("rms", "layer")
QK_NORMS = ("shared", "own", "joint")
CHOICES = {"activation": ACTIVATIONS, "norm": NORMS, "qk_norm_kind": QK_NORMS, "routing_scores": SCORES}


@dataclass(frozen=True)
class LayerSizes:
    """What layers may differ in."""

    heads: int  # query heads
    kv_heads: int
    d_ff: int
    experts: int = 0  # of a layer that has some
    d_expert: int = 0
    d_shared: int = 0


LAYER_SIZES = tuple(LayerSizes.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder-only language model; built from a config.json by `jprune.models.families.config`.

    `heads`, `kv_heads`, `d_ff` and the sizes of experts hold for every layer unless `sizes` gives them layer by layer.
    Sizes that are all equal become those, so that configs of equal models are equal. The fields below the sizes are the
    options in which families differ; their defaults are Llama's.
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

    # Latent attention (`jprune.models.latent`); 0 where keys and values are read from the residual stream
    kv_rank: int = 0  # width of what the keys and values of a token are made of
    q_rank: int = 0  # width of what its queries are made of; 0: the residual stream
    d_rope: int = 0  # the last dimensions of a head that are turned; of keys the same for all heads
    d_value: int = 0  # size of a head's values
    latent_norm_eps: float = 1e-6

    # Experts; 0 where every layer has one MLP
    experts: int = 0
    experts_per_token: int = 0
    d_expert: int = 0  # width of one of them
    d_shared: int = 0  # width of the expert that sees every token; 0: there is none
    normalise_routing: bool = False  # the weights of a token's experts sum to one
    routing_scores: str = "softmax"  # or "sigmoid"; this and what follows is in `jprune.models.routing.Routing`
    routing_scale: float = 1.0
    float32_routing: bool = False  # routers have float32 parameters, and their logits, in models of fewer bits too
    routing_correction: bool = False  # a term of each expert that is added to its score where experts are chosen
    expert_groups: int = 1
    groups_per_token: int = 1
    group_best: int = 1
    expert_bias: bool = False  # routers and experts have biases
    swiglu: tuple[float, float] | None = (
        None  # (s, m): experts have min(g, m) sigmoid(s min(g, m)) (clip(u, -m, m) + 1)
    )
    shared_gate: bool = True  # what the expert that sees every token gives is multiplied by a sigmoid
    dense_layers: tuple[int, ...] = ()  # layers that have one MLP all the same

    # Numbers
    score_scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    sinks: bool = False  # each head sees one more key, of a score that is learnt, which has no value
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
        self._check_experts()
        if self.kv_rank and (self.kv_heads != self.heads or not 0 < self.d_rope < self.head_dim or self.d_value < 1):
            raise JpruneError(
                f"{self.architecture}: latent attention needs as many key/value heads as query heads "
                f"({self.kv_heads}, {self.heads}), heads of which a part is turned ({self.d_rope} of {self.head_dim}) "
                f"and values ({self.d_value})"
            )
        for name, known in CHOICES.items():
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
            for name in named_by(self):
                if not isinstance(size := getattr(layer, name), int) or size < 1:
                    raise JpruneError(
                        f"{self.architecture}, layer {i}: {name} must be a positive integer, got {size!r}"
                    )
            if layer.heads % layer.kv_heads:
                raise JpruneError(
                    f"{self.architecture}, layer {i}: {layer.heads} query heads cannot share {layer.kv_heads} "
                    "key/value heads evenly; every key/value head needs equally many query heads"
                )

    def _check_experts(self) -> None:
        if not self.experts:
            return
        own = {(layer.experts, layer.d_expert) for layer in self.sizes}
        for count, width in sorted({(self.experts, self.d_expert)} | own):
            self._check_some_experts(count, width)

    def _check_some_experts(self, count: int, width: int) -> None:
        if not (1 <= self.experts_per_token <= count and width >= 1):
            raise JpruneError(
                f"{self.architecture}: {self.experts_per_token} of {count} experts of width {width} for "
                "each token; expected at least one, no more than there are, and a width"
            )
        groups, most = self.expert_groups, self.groups_per_token
        if groups < 1 or count % groups or not 1 <= most <= groups:
            raise JpruneError(f"{self.architecture}: {count} experts in {groups} groups, {most} for each token")
        if self.experts_per_token > most * count // groups:
            raise JpruneError(
                f"{self.architecture}: {self.experts_per_token} experts for each token, but its {most} of {groups} "
                f"groups have {most * count // groups}"
            )

    @property
    def d_nope(self) -> int:
        """Of latent attention: the dimensions of a head that are not turned."""
        return self.head_dim - self.d_rope

    @property
    def routing(self) -> Routing:
        """How routers are read."""
        return Routing(
            per_token=self.experts_per_token,
            scores=self.routing_scores,
            normalise=self.normalise_routing,
            scale=self.routing_scale,
            groups=self.expert_groups,
            groups_per_token=self.groups_per_token,
            group_best=self.group_best,
            float32=self.float32_routing,
        )

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        return not self.sizes

    def layer(self, index: int) -> LayerSizes:
        """The sizes of one layer."""
        return self.sizes[index] if self.sizes else LayerSizes(**{name: getattr(self, name) for name in LAYER_SIZES})

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
    """All sizes as plain values for JSON: `vocab`, `d_model`, `head_dim`, and those of every layer."""
    return {
        "vocab": config.vocab,
        "d_model": config.d_model,
        "head_dim": config.head_dim,
        "layers": [named_sizes(config, i) for i in range(config.layers)],
    }


def named_by(config: DecoderConfig) -> tuple[str, ...]:
    """The names of the sizes that layers of a model may differ in: those of experts only where it has some."""
    without = {name for name in ("experts", "d_expert", "d_shared") if not getattr(config, name)}
    return tuple(name for name in LAYER_SIZES if name not in without)


def named_sizes(config: DecoderConfig, index: int) -> dict[str, int]:
    """The sizes of a layer by name: heads, kv_heads, d_ff, and those of experts where it has some."""
    names = named_by(config)[: None if config.has_experts(index) else 3]
    return {name: getattr(config.layer(index), name) for name in names}
