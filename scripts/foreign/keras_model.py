"""A Keras model on its JAX backend: attention, a convolution and dense layers."""

import os

os.environ["KERAS_BACKEND"] = "jax"
import jax
import keras


def made():
    tokens = keras.Input((16,), dtype="int32")
    x = keras.layers.Embedding(64, 32)(tokens)
    h = keras.layers.LayerNormalization()(x)
    x = x + keras.layers.MultiHeadAttention(4, 8)(h, h)
    x = x + keras.layers.Conv1D(32, 3, padding="same", activation="relu")(x)
    x = x + keras.layers.Dense(32)(keras.layers.Dense(96, activation="gelu")(x))
    model = keras.Model(tokens, keras.layers.Dense(64)(x))
    params = {variable.path: variable.value for variable in model.trainable_variables}
    fixed = [variable.value for variable in model.non_trainable_variables]

    def forward(params, fixed, tokens):
        return model.stateless_call([params[v.path] for v in model.trainable_variables], fixed, tokens)[0]

    return forward, params, (fixed, jax.random.randint(jax.random.key(1), (8, 16), 0, 64))
