"""Which parameters a model has: their paths, the names of their axes, and their shapes."""

import re

from jprune.models.config import DecoderConfig


def parameters(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The path of every parameter of the model and the names of its axes; for their lengths see `shapes`."""
    block = {
        **_norm(config, "attn_norm", when=config.pre_norm),
        **(_latent_attention(config) if config.kv_rank else _attention(config)),
        **_norm(config, "attn_post_norm", when=config.post_norm),
        **_norm(config, "mlp_norm", when=config.pre_norm and not config.shared_norm),
        **_norm(config, "mlp_post_norm", when=config.post_norm),
    }
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


def _attention(config: DecoderConfig) -> dict[str, str]:
    attn = {
        "attn/q/kernel": "d_model heads head_dim",
        "attn/k/kernel": "d_model kv_heads head_dim",
        "attn/v/kernel": "d_model kv_heads head_dim",
        "attn/o/kernel": "heads head_dim d_model",
    }
    if config.qkv_bias:
        attn |= {
            "attn/q/bias": "heads head_dim",
            "attn/k/bias": "kv_heads head_dim",
            "attn/v/bias": "kv_heads head_dim",
        }
    if config.o_bias:
        attn |= {"attn/o/bias": "d_model"}
    if config.sinks:
        attn |= {"attn/sinks": "heads"}
    if config.qk_norm:
        for name, heads in (("q_norm", "heads"), ("k_norm", "kv_heads")):
            axes = "head_dim" if config.qk_norm_kind == "shared" else f"{heads} head_dim"
            attn |= {f"attn/{name}/scale": axes}
            attn |= {f"attn/{name}/bias": axes} if config.qk_norm_bias else {}
    return attn


def _latent_attention(config: DecoderConfig) -> dict[str, str]:
    attn = {
        "attn/q/kernel": f"{'q_rank' if config.q_rank else 'd_model'} heads head_dim",
        "attn/kv_down/kernel": "d_model kv_rank",
        "attn/kv_down_norm/scale": "kv_rank",
        "attn/k_rope/kernel": "d_model d_rope",
        "attn/k/kernel": "kv_rank heads d_nope",
        "attn/v/kernel": "kv_rank heads d_value",
        "attn/o/kernel": "heads d_value d_model",
    }
    if config.q_rank:
        attn |= {"attn/q_down/kernel": "d_model q_rank", "attn/q_down_norm/scale": "q_rank"}
    if config.qkv_bias:
        attn |= {"attn/kv_down/bias": "kv_rank", "attn/k_rope/bias": "d_rope"}
        attn |= {"attn/q_down/bias": "q_rank"} if config.q_rank else {}
    if config.o_bias:
        attn |= {"attn/o/bias": "d_model"}
    return attn


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
    if config.expert_bias:
        mlp |= {
            "mlp/router/bias": "experts",
            "mlp/experts/gate/bias": "experts d_expert",
            "mlp/experts/up/bias": "experts d_expert",
            "mlp/experts/down/bias": "experts d_model",
        }
    if config.routing_correction:
        mlp |= {"mlp/router/correction": "experts"}
    if config.d_shared:
        mlp |= {"mlp/shared_gate/kernel": "d_model"} if config.shared_gate else {}
        mlp |= {
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
