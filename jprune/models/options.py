"""What the parts of a layer must know that is not an array: the config's options, for one layer."""

import dataclasses

from jprune.models.attention import alibi_slopes
from jprune.models.config import DecoderConfig
from jprune.models.rope import Rope
from jprune.models.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormOptions:
    """What all norms of a model have in common; see `DecoderConfig`."""

    kind: str
    eps: float
    offset: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a layer must know that is not an array; layers with equal options share their functions."""

    norm: NormOptions
    norm_after: bool
    parallel: bool
    residual_scale: float
    activation: str
    rope: Rope | None
    window: int | None
    slopes: tuple[float, ...] | None
    score_scale: float | None
    score_cap: float | None
    qk_norm_kind: str
    latent_norm: NormOptions
    routing: Routing
    swiglu: tuple[float, float] | None

    @classmethod
    def of(cls, config: DecoderConfig, index: int) -> "Options":
        """The options of layer `index`."""
        return cls(
            norm=norm_options(config),
            norm_after=config.norm_after,
            parallel=config.parallel,
            residual_scale=config.residual_scale,
            activation=config.activation,
            rope=config.rope_of(index),
            window=config.windows[index],
            slopes=alibi_slopes(config.layer(index).heads) if config.alibi else None,
            score_scale=config.score_scale,
            score_cap=config.score_cap,
            qk_norm_kind=config.qk_norm_kind,
            latent_norm=dataclasses.replace(norm_options(config), eps=config.latent_norm_eps),
            routing=config.routing,
            swiglu=config.swiglu,
        )


def norm_options(config: DecoderConfig) -> NormOptions:
    """The options of a model's norms."""
    return NormOptions(kind=config.norm, eps=config.norm_eps, offset=config.norm_offset)
