"""A small Gemma 3 of DeepMind's package: fused kernels [2, ...], and an embedding that is the head too."""

import jax
from gemma.gm.nn._config import TransformerConfig
from gemma.gm.nn._modules import AttentionType
from gemma.gm.nn._transformer import Transformer


def made():
    config = TransformerConfig(
        num_embed=64,
        embed_dim=32,
        hidden_dim=96,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
        sliding_window_size=8,
        transpose_gating_einsum=True,
    )
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 1, 64)
    model = Transformer(config=config, dtype=jax.numpy.float32)
    variables = model.init(jax.random.key(0), tokens)
    return lambda variables, tokens: model.apply(variables, tokens).logits, variables, (tokens,)
