"""A decoder of Flax Linen whose feed-forward kernels qwix rounds to int8 while they are trained."""

import jax
import qwix
from flax_linen import Decoder


def made():
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    rule = qwix.QuantizationRule(module_path=".*/Dense_.*", weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(Decoder(), qwix.QtProvider([rule]))
    return model.apply, model.init(jax.random.key(0), tokens), (tokens,)
