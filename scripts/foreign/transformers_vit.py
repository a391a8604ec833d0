"""FlaxViT of transformers 4: patches are embedded by a convolution, and the class token is a parameter."""

import jax
from transformers import FlaxViTForImageClassification, ViTConfig


def made():
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=8,
    )
    model = FlaxViTForImageClassification(config, seed=0)
    pixels = jax.random.normal(jax.random.key(1), (8, 3, 16, 16))
    return lambda params, pixels: model(pixels, params=params).logits, model.params, (pixels,)
