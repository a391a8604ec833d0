"""A decoder of Flax Linen with the adapters of qwix beside its kernels."""

import jax
import qwix
from flax_linen import Decoder


def made():
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    rule = qwix.LoraRule(
        module_path=".*Layer_.*", rank=4, alpha=8, lora_b_initializer=jax.nn.initializers.lecun_normal()
    )
    model = qwix.apply_lora_to_model(Decoder(), qwix.LoraProvider([rule]))
    return model.apply, model.init(jax.random.key(0), tokens), (tokens,)
